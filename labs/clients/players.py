"""Scripted players of a DarkPlaces game: each a connection of its own that moves 20 times a second and watches.

Runs in the clients machine as `python3 -m labs.clients.players`, one thread, standard library only. It takes one word a
line on standard input (`begin`, `end`: an interval of interest, called a hop; `snapshot`; `stop`) and answers each with
one JSON object a line. No player ever connects again: who is dropped stays dropped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import selectors
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from labs.clients import darkplaces
from labs.clients.darkplaces import Channel, ProtocolError

MOVE_INTERVAL_S = 0.05
ASK_AGAIN_S = 1.0
PATIENCE_S = 15.0
"""A player whom the server told nothing for so long is dropped."""

JOIN_TIMEOUT_S = 60.0
ROOM_BYTES = 4 << 20
"""For snapshots: what is lost is to be the server's or the network's loss, not ours."""

LAST_STAGE = 3
TURN_DEGREES = 7
RUN = 400
BUTTONS_EVERY = 10
"""One move in so many has the trigger pulled, and another one a jump: both make a spectator or a dead one play."""


@dataclass(frozen=True)
class Seen:
    """What one player saw. Times are in milliseconds; `lost` is gaps in the numbers of the server's snapshots."""

    name: str
    ping_ms: float
    silence_ms: float
    longest_silence_ms: float
    longest_step_ms: float
    snapshots: int
    lost: int
    backwards: int
    refused: int
    trouble: str


class Player:
    """One connection, from the first question to the last snapshot."""

    def __init__(self, address: str, port: int, name: str) -> None:
        self.name = name
        self.trouble = ""
        self.plays = False
        self.sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, ROOM_BYTES)
        self.sock.connect((address, port))
        self.sock.setblocking(False)
        self._channel = Channel()
        self._connected = False
        self._stage = 0
        self._heading = random.uniform(0, 360)
        self._server_time = 0.0
        self._last = self._next_ask = time.monotonic()
        self._next_move = self._last + random.uniform(0, MOVE_INTERVAL_S)
        self._moves = self._refused = self._backwards = 0
        self._moved_at: dict[int, float] = {}
        self._ping_s = self._longest_silence_s = self._longest_step_s = 0.0
        self._challenge = ""

    # What comes

    def receive(self) -> None:
        """Take everything that has come."""
        while not self.trouble:
            try:
                packet = self.sock.recv(65536)
            except BlockingIOError:
                return
            except ConnectionRefusedError:
                self._refused += 1  # told by ICMP that nobody has the port: the engine's clients pass over it
                continue
            try:
                self._take(packet, time.monotonic())
            except ProtocolError as error:
                self.trouble = str(error)

    def _take(self, packet: bytes, now: float) -> None:
        if packet.startswith(darkplaces.OUT_OF_BAND):
            self._take_answer(packet)
            return
        message, replies = self._channel.receive(packet, now)
        for reply in replies:
            self._send(reply)
        if not message:
            return
        if message[0] == darkplaces.DISCONNECT:
            self.trouble = "the server ended the connection"
        elif snapshot := darkplaces.snapshot(message):
            if self._stage == LAST_STAGE:
                self._take_snapshot(snapshot, now)
        elif self._stage < LAST_STAGE and darkplaces.reaches(message, self._stage + 1):
            self._stage += 1
            for answer in darkplaces.signon_answer(self._stage, self.name):
                self._channel.send_reliable(answer)
            self._send_due(now)
        elif darkplaces.is_new_level(message):
            self.trouble = "the server began another level"

    def _take_answer(self, packet: bytes) -> None:
        if self._connected:
            return
        if challenge := darkplaces.challenge(packet):
            self._challenge = challenge
            self._send(darkplaces.connect(challenge))
        elif packet.startswith(darkplaces.OUT_OF_BAND + b"accept"):
            self._connected = True
        elif packet.startswith(darkplaces.OUT_OF_BAND + b"reject"):
            self.trouble = f"the server says: {packet[4:].decode(errors='replace')}"

    def _take_snapshot(self, snapshot: darkplaces.Snapshot, now: float) -> None:
        if self.plays:
            self._backwards += snapshot.time < self._server_time
            self._longest_step_s = max(self._longest_step_s, snapshot.time - self._server_time)
            self._longest_silence_s = max(self._longest_silence_s, now - self._last)
        self.plays = True
        self._server_time, self._last = snapshot.time, now
        if snapshot.frame is not None:
            self._send(self._channel.unreliable(darkplaces.acknowledge(snapshot.frame)))
        if snapshot.move in self._moved_at:
            self._ping_s = now - self._moved_at[snapshot.move]
            self._moved_at = {number: at for number, at in self._moved_at.items() if number > snapshot.move}

    # What goes

    def act(self, now: float) -> None:
        """Send what is due."""
        if self.trouble:
            return
        if not self._connected:
            if now >= self._next_ask:
                self._next_ask = now + ASK_AGAIN_S
                known = darkplaces.connect(self._challenge) if self._challenge else b""
                self._send(known or darkplaces.OUT_OF_BAND + b"getchallenge")
            return
        self._send_due(now)
        while self.plays and self._next_move <= now:
            self._next_move += MOVE_INTERVAL_S
            self._move(now)
        if not self.plays:
            self._next_move = now + MOVE_INTERVAL_S
        if self.plays and now - self._last > PATIENCE_S:
            self.trouble = f"nothing from the server for {PATIENCE_S:g} s"

    def _move(self, now: float) -> None:
        self._moves += 1
        self._heading += random.uniform(-TURN_DEGREES, TURN_DEGREES)
        buttons = {0: darkplaces.BUTTON_ATTACK, BUTTONS_EVERY // 2: darkplaces.BUTTON_JUMP}
        pressed = buttons.get(self._moves % BUTTONS_EVERY, 0)
        self._moved_at[self._moves] = now
        move = darkplaces.move(self._moves, self._server_time, self._heading, RUN, pressed)
        self._send(self._channel.unreliable(move))

    def _send_due(self, now: float) -> None:
        for packet in self._channel.due(now):
            self._send(packet)

    def _send(self, packet: bytes) -> None:
        try:
            self.sock.send(packet)
        except ConnectionRefusedError:
            self._refused += 1

    # What is told

    def seen(self) -> Seen:
        silence_s = time.monotonic() - self._last
        return Seen(
            name=self.name,
            ping_ms=round(self._ping_s * 1000, 1),
            silence_ms=round(silence_s * 1000, 1),
            longest_silence_ms=round(max(self._longest_silence_s, silence_s) * 1000, 1),
            longest_step_ms=round(self._longest_step_s * 1000, 1),
            snapshots=self._channel.received,
            lost=self._channel.lost,
            backwards=self._backwards,
            refused=self._refused,
            trouble=self.trouble,
        )

    def begin_hop(self) -> None:
        """Forget the longest times: from now on they are those of a hop. Everything else is counted on."""
        self._longest_silence_s = self._longest_step_s = 0.0


class Game:
    """All players, and the one loop that drives them."""

    def __init__(self, address: str, port: int, players: int) -> None:
        self.players = [Player(address, port, f"player{number}") for number in range(1, players + 1)]
        self._selector = selectors.DefaultSelector()
        for player in self.players:
            self._selector.register(player.sock, selectors.EVENT_READ, player.receive)

    def watch_input(self, descriptor: int, act: Callable[[], None]) -> None:
        """Have `act` called when there is something to read from `descriptor`."""
        self._selector.register(descriptor, selectors.EVENT_READ, act)

    def turn(self) -> None:
        """Send what is due, and take what has come."""
        now = time.monotonic()
        for player in self.players:
            player.act(now)
        for key, _ in self._selector.select(0.005):
            key.data()

    def join(self) -> None:
        """Return when everybody plays; a TimeoutError says who does not."""
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while not all(player.plays for player in self.players):
            self.turn()
            troubles = [f"{player.name}: {player.trouble}" for player in self.players if player.trouble]
            if troubles:
                raise ProtocolError("; ".join(troubles))
            if time.monotonic() > deadline:
                missing = ", ".join(player.name for player in self.players if not player.plays)
                raise TimeoutError(f"not in the game after {JOIN_TIMEOUT_S:g} s: {missing}")

    def begin_hop(self) -> None:
        for player in self.players:
            player.begin_hop()

    def tell(self, event: str) -> None:
        players = [asdict(player.seen()) for player in self.players]
        print(json.dumps({"event": event, "players": players}), flush=True)


class Words:
    """The words from outside."""

    def __init__(self, game: Game) -> None:
        self._game = game
        self._pending = b""
        self.ended = False

    def read(self) -> None:
        data = os.read(sys.stdin.fileno(), 4096)
        self.ended = not data
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            word = line.decode().strip()
            if word == "begin":
                self._game.begin_hop()
            elif word not in ("end", "snapshot", "stop"):
                sys.exit(f"{word!r} is not one of begin, end, snapshot, stop")
            self._game.tell(word)
            self.ended = word == "stop"


def main() -> None:
    parser = argparse.ArgumentParser(prog="players", description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--players", type=int, default=8)
    options = parser.parse_args()
    game = Game(options.address, options.port, options.players)
    try:
        game.join()
    except (OSError, ProtocolError) as error:
        sys.exit(f"cannot join {options.address} port {options.port}: {error}")
    game.tell("ready")
    words = Words(game)
    game.watch_input(sys.stdin.fileno(), words.read)
    while not words.ended:
        game.turn()


if __name__ == "__main__":
    main()
