"""A game server goes around the lab's hosts while players are in it, and the players say what they saw."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from labs import workloads
from labs.board import UNSEEN_MS, Board
from labs.catalogue.base import Service
from labs.clients.control import ClientProcess
from labs.lab import Lab
from labs.livemove import migrate
from labs.topology import HOSTS

SETTLE_S = 1.0
"""How long the players watch on after a move: what goes wrong late counts too."""

JOIN_TIMEOUT_S = 90.0


class Players(ClientProcess):
    """Scripted players in the game (`labs/clients/players.py`), until `stop`. May be asked by several threads."""

    def __init__(self, lab: Lab, service: Service, players: int) -> None:
        """Return when all of them play."""
        self._one_at_a_time = threading.Lock()
        where = ["--address", service.address, "--port", str(service.port), "--players", str(players)]
        super().__init__(lab, "labs.clients.players", where, answer_timeout_s=JOIN_TIMEOUT_S)

    def look(self) -> list[dict[str, Any]]:
        """What each sees: `labs.clients.players.Seen` as a dictionary."""
        return self._players("snapshot")

    def begin_hop(self) -> list[dict[str, Any]]:
        """From now on the longest times are those of a hop."""
        return self._players("begin")

    def end_hop(self) -> list[dict[str, Any]]:
        return self._players("end")

    def _players(self, word: str) -> list[dict[str, Any]]:
        with self._one_at_a_time:
            players: list[dict[str, Any]] = self._ask(word)["players"]
        return players


@dataclass
class Hop:
    """One move of the game; a part of `--json`. Times in milliseconds, the silence that of the player who had most."""

    source: str
    destination: str
    freeze_ms: float
    longest_silence_ms: float

    def to_json(self) -> dict[str, Any]:
        times = {"freeze_ms": self.freeze_ms, "longest_silence_ms": self.longest_silence_ms}
        return {"from": self.source, "to": self.destination, **times}


@dataclass
class Result:
    """What became of the game: the format of `--json`."""

    engine: str
    players: int
    dropped: int = 0
    snapshots_lost: int = 0
    hops: list[Hop] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        counts = {"players": self.players, "dropped": self.dropped, "snapshots_lost": self.snapshots_lost}
        problems = {"problems": self.problems} if self.problems else {}
        return {"engine": self.engine, **counts, "hops": [hop.to_json() for hop in self.hops], **problems}

    def count(self, players: list[dict[str, Any]]) -> None:
        """Take what the players saw in the whole game."""
        self.dropped = sum(bool(each["trouble"]) for each in players)
        self.snapshots_lost = sum(each["lost"] for each in players)
        for each in players:
            troubles = [each["trouble"]] if each["trouble"] else []
            if each["lost"]:
                troubles.append(f"{each['lost']} snapshots lost")
            if each["backwards"]:
                troubles.append(f"the server's time went backwards {each['backwards']} times")
            if each["refused"]:
                troubles.append(f"told {each['refused']} times that nobody has the port")
            self.problems += [f"{each['name']}: {trouble}" for trouble in troubles]


@dataclass(frozen=True)
class Round:
    """The way of the game through the lab: alpha → beta → gamma → alpha."""

    lab: Lab
    workload: workloads.Workload
    players: Players
    board: Board
    mode: str
    pause_s: float
    look: Callable[[str], None]
    """Called with the name of the host before the first hop, and of each that the game has come to."""

    def go(self, rounds: int, result: Result) -> None:
        """Go around so many times, or until a move has failed or a player is dropped."""
        names = [host.name for host in HOSTS]
        self.look(names[0])
        for number in range(rounds * len(names)):
            source, destination = names[number % len(names)], names[(number + 1) % len(names)]
            self.board.doing(f"{result.engine} on {source}")
            time.sleep(self.pause_s)
            self.board.doing(f"{result.engine}: {source} → {destination}, {number + 1} of {rounds * len(names)}")
            if not self._hop(source, destination, result):
                return
            self.look(destination)

    def _hop(self, source: str, destination: str, result: Result) -> bool:
        self.players.begin_hop()
        moved = migrate(self.lab, self.workload.name, destination, self.board.note, options=["--mode", self.mode])
        time.sleep(SETTLE_S)
        seen = self.players.end_hop()
        what = f"{source} → {destination}"
        if moved.get("outcome") != "moved" or moved.get("exit_code") != 0:
            result.problems.append(f"{what}: {moved.get('outcome')}: {moved.get('error')}")
        elif (found := workloads.where(self.lab, self.workload)) != [destination]:
            result.problems.append(f"{what}: it listens on {' and '.join(found) or 'no host'}")
        hop = Hop(source, destination, moved.get("freeze_ms") or 0.0, max(each["longest_silence_ms"] for each in seen))
        result.hops.append(hop)
        dropped = [each["name"] for each in seen if each["trouble"]]
        well = not result.problems and not dropped
        step = max(each["longest_step_ms"] for each in seen)
        told = f"{what}: freeze {hop.freeze_ms:.0f} ms, longest silence {hop.longest_silence_ms:.0f} ms"
        told += "" if hop.longest_silence_ms < UNSEEN_MS else f" (players see it: {UNSEEN_MS} ms or more)"
        self.board.say(f"{told}, longest step of the server's time {step:.0f} ms", well=well)
        return well
