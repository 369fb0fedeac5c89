"""Clients at work in the lab's clients machine, as one object for the demo, benchmarks and tests."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from labs.clients.load import PATIENCE_S
from labs.commands import LabError
from labs.lab import Lab

ANSWER_TIMEOUT_S = 30.0
MEMORY_TIMEOUT_S = 90.0
PROJECT = Path(__file__).resolve().parents[2]


class ClientProcess:
    """A program in the clients machine that answers words with JSON, one line each. Undo of creating one: `stop`, or
    leaving it as a context."""

    def __init__(
        self, lab: Lab, module: str, options: list[str], *, answer_timeout_s: float = ANSWER_TIMEOUT_S
    ) -> None:
        """Start it; return when it says that it is ready."""
        # PYTHONPATH, not a directory to stand in: the machine shares our file system, not our place in it.
        python = ["env", f"PYTHONPATH={PROJECT}", sys.executable, "-m"]
        self._machine = lab.machine("clients")
        self._answer_timeout_s = answer_timeout_s
        self._process: subprocess.Popen[str] = self._machine.popen(
            [*python, module, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for whoever holds this object, who then closes it
        )
        try:
            self._answer("ready")
        except BaseException:
            self.close()
            raise

    def stop(self) -> dict[str, Any]:
        """Let the last answers come in, close, and return what was seen in the whole run."""
        result = self._ask("stop")
        self.close()
        return result

    def close(self) -> None:
        """End the clients without asking them anything. May be repeated."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self._ended(word) from None
        return self._answer(word)

    def _answer(self, event: str) -> dict[str, Any]:
        """The next line, which is the answer: it comes in one piece, so waiting for its beginning is enough."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], self._answer_timeout_s)[0]:
            raise LabError(f"the clients did not answer {event!r} within {self._answer_timeout_s:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._ended(event)
        answer: dict[str, Any] = json.loads(line)
        if answer.pop("event") != event:
            raise LabError(f"the clients answered {line.strip()!r} instead of {event!r}")
        return answer

    def _ended(self, event: str) -> LabError:
        said = self._process.communicate(timeout=ANSWER_TIMEOUT_S)[1].strip()
        status = self._process.returncode
        return LabError(f"the clients ended (exit status {status}) before they answered {event!r}: {said}")


class Clients(ClientProcess):
    """A running load generator (`load.py`)."""

    def __init__(
        self, lab: Lab, address: str, port: int, connections: int = 20, *, patience_s: float = PATIENCE_S
    ) -> None:
        """Connect all clients; return when every one is connected. They ask until `stop`, or until we end.

        A connection that was silent for `patience_s` is given up and counts as lost.
        """
        self._lab, self._where = lab, (address, port)
        where = ["--address", address, "--port", str(port)]
        options = ["--connections", str(connections), "--patience-s", f"{patience_s:g}"]
        super().__init__(lab, "labs.clients.load", [*where, *options])

    def begin_hop(self) -> dict[str, Any]:
        """From now on count for a hop; returns what was seen until now."""
        return self._ask("begin")

    def end_hop(self) -> dict[str, Any]:
        """What the clients saw since `begin_hop`: connections, lost, resets, wrong_bytes, longest_gap_ms,
        retransmissions, requests, answers, seconds, gaps_ms (one a connection), troubles (one line each)."""
        return self._ask("end")

    def snapshot(self) -> dict[str, Any]:
        """What the clients have seen since they began."""
        return self._ask("snapshot")

    def check_memory(self) -> dict[str, int]:
        """Have the service look at all its memory: pages, wrong_pages. It answers nobody else meanwhile."""
        return check_memory(self._lab, *self._where)


def check_memory(lab: Lab, address: str, port: int) -> dict[str, int]:
    """Have a pattern service look at all its memory: pages, wrong_pages. It answers nobody else meanwhile."""
    python = ["env", f"PYTHONPATH={PROJECT}", sys.executable, "-m", "labs.clients.load"]
    where = ["--address", address, "--port", str(port)]
    checked = lab.machine("clients").run([*python, *where, "--check-memory"], timeout=MEMORY_TIMEOUT_S)
    answer: dict[str, int] = json.loads(checked.stdout)
    return {name: answer[name] for name in ("pages", "wrong_pages")}
