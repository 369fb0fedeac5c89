"""Clients of real services: each a session of its own that goes on and on and checks every answer.

A module with sessions runs in the clients machine as `python3 -m labs.clients.NAME`, standard library only, and calls
`main`. It takes one word a line on standard input (`begin`, `end`: an interval of interest, called a hop; `snapshot`;
`stop`) and answers each with one JSON object a line. It ends by itself when its input ends. No session ever connects
again: what is lost stays lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import ClassVar

PATIENCE_S = 15.0
"""A session that waited so long for one answer is lost."""

CONNECT_TIMEOUT_S = 10.0
OPEN_TIMEOUT_S = 30.0


class WrongAnswer(Exception):
    """The service said something else than what was due: what, and what was due."""


def expect(found: object, due: object, what: str) -> None:
    """Raise `WrongAnswer` unless both are the same."""
    if found != due:
        raise WrongAnswer(f"{what}: {str(found)[:200]!r} where {str(due)[:200]!r} was due")


class Session(ABC):
    """One client with its connections. What it raises ends it: `WrongAnswer` counts as wrong, and an OSError, an early
    end of the stream or a time-out as lost."""

    interval_s = 0.01
    """How long it waits between two steps."""

    connections = 1
    """How many it holds open."""

    @abstractmethod
    async def open(self) -> None:
        """Connect."""

    @abstractmethod
    async def step(self) -> None:
        """Ask once and check the answer, or wait for what is due next and check it."""

    async def finish(self) -> None:  # noqa: B027 - many have nothing to look at
        """The last look, after the last step of all sessions: what the service holds must be what was done."""


class Stream:
    """A TCP connection with the few verbs that text and binary protocols need."""

    _open: ClassVar[list[Stream]] = []

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._open.append(self)

    @classmethod
    async def close_all(cls) -> None:
        """Close every connection of the process."""
        while cls._open:
            stream = cls._open.pop()
            stream._writer.close()
            with suppress(OSError):
                await stream._writer.wait_closed()

    @classmethod
    async def connect(cls, address: str, port: int, **options: int) -> Stream:
        """Connect; `options` are those of asyncio.open_connection."""
        opening = asyncio.open_connection(address, port, **options)
        return cls(*await asyncio.wait_for(opening, CONNECT_TIMEOUT_S))

    def send(self, data: bytes) -> None:
        """Send, or keep for sending as soon as the connection takes it."""
        if self._reader.at_eof():
            raise ConnectionResetError("closed by the other side")
        self._writer.write(data)

    async def drained(self) -> None:
        """Return when little is left to send."""
        await self._writer.drain()

    async def line(self) -> str:
        """The next line, without its end."""
        data = await self._reader.readuntil(b"\n")
        return data.rstrip(b"\r\n").decode()

    async def exactly(self, size: int) -> bytes:
        """The next `size` bytes."""
        return await self._reader.readexactly(size)

    async def until(self, end: bytes) -> bytes:
        """What comes up to and with `end`."""
        return await self._reader.readuntil(end)


@dataclass
class Seen:
    """What the sessions saw; the same for a hop and for the whole run."""

    connections: int = 0
    lost: int = 0
    wrong: int = 0
    answers: int = 0
    longest_gap_ms: float = 0.0
    slowest: str = ""
    troubles: list[str] = field(default_factory=list)


class _Watched:
    """A session, and what happened to it."""

    def __init__(self, session: Session, number: int) -> None:
        self.session = session
        self.name = f"{type(session).__name__} {number}"
        self.answers = self.lost = self.wrong = 0
        self.trouble = ""
        self.ended = False
        self.last_answer = time.monotonic()
        self.longest_gap_s = self.longest_hop_gap_s = 0.0

    async def go_on(self, stopping: asyncio.Event) -> None:
        """Step after step until `stopping`, or until something is wrong."""
        # Sessions that all ask at the same moment would measure each other.
        await asyncio.sleep(random.uniform(0, self.session.interval_s))
        self.last_answer = time.monotonic()
        while not stopping.is_set() and await self._survives(self.session.step):
            self.answers += 1
            self.note_silence()
            self.last_answer = time.monotonic()
            await asyncio.sleep(self.session.interval_s)
        self.ended = True

    async def finish(self) -> None:
        if not self.trouble:
            await self._survives(self.session.finish)

    async def _survives(self, act: Callable[[], Awaitable[None]]) -> bool:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await act()
        except WrongAnswer as error:
            self.wrong, self.trouble = 1, str(error)
        except (OSError, EOFError, TimeoutError) as error:
            self.lost = self.session.connections
            self.trouble = str(error) or f"no answer for {PATIENCE_S:g} s"
        return not self.trouble

    def note_silence(self) -> None:
        gap = time.monotonic() - self.last_answer
        self.longest_gap_s = max(self.longest_gap_s, gap)
        self.longest_hop_gap_s = max(self.longest_hop_gap_s, gap)


class Run:
    """All sessions, and the words from outside."""

    def __init__(self, sessions: Sequence[Session], say: Callable[[str, Seen], None]) -> None:
        """`say` is told each word with the answer to it."""
        self._say = say
        self._watched = [_Watched(session, number) for number, session in enumerate(sessions)]
        self._stopping = asyncio.Event()
        self._before_hop = Seen()

    async def obey(self, words: asyncio.StreamReader) -> None:
        """Have the sessions go on until `stop`, or until the input ends."""
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            await asyncio.gather(*(each.session.open() for each in self._watched))
        tasks = [asyncio.create_task(each.go_on(self._stopping)) for each in self._watched]
        self._say("ready", self.whole_run())
        actions = {"begin": self.begin_hop, "end": self.end_hop, "snapshot": self.whole_run}
        while (word := (await words.readline()).decode().strip()) in actions:
            self._say(word, actions[word]())
        if word != "stop":
            sys.exit(f"{word!r} is not one of {', '.join(actions)}, stop" if word else 0)
        self._stopping.set()
        await asyncio.gather(*tasks)
        for each in self._watched:
            await each.finish()
        await Stream.close_all()
        self._say("stop", self.whole_run())

    def whole_run(self) -> Seen:
        """Everything since the start."""
        seen = Seen()
        for each in self._watched:
            if not each.ended:
                each.note_silence()
            seen.connections += each.session.connections
            seen.lost += each.lost
            seen.wrong += each.wrong
            seen.answers += each.answers
            seen.troubles += [f"{each.name}: {each.trouble}"] if each.trouble else []
        self._longest(seen, {each.name: each.longest_gap_s for each in self._watched})
        return seen

    def begin_hop(self) -> Seen:
        """From now on count for a hop."""
        self._before_hop = self.whole_run()
        for each in self._watched:
            each.longest_hop_gap_s = 0.0
        return self._before_hop

    def end_hop(self) -> Seen:
        """The difference to `begin_hop`."""
        before, hop = self._before_hop, self.whole_run()
        hop.lost -= before.lost
        hop.wrong -= before.wrong
        hop.answers -= before.answers
        hop.troubles = [trouble for trouble in hop.troubles if trouble not in before.troubles]
        self._longest(hop, {each.name: each.longest_hop_gap_s for each in self._watched})
        return hop

    @staticmethod
    def _longest(seen: Seen, gaps: dict[str, float]) -> None:
        seen.slowest, gap = max(gaps.items(), key=lambda item: item[1])
        seen.longest_gap_ms = round(gap * 1000, 1)


def _say(event: str, seen: Seen) -> None:
    print(json.dumps({"event": event, **asdict(seen)}), flush=True)


async def _standard_input() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


def main(sessions: Callable[[str, int, str], Sequence[Session]]) -> None:
    """Run what `sessions(address, port, folder)` makes; `folder` is the service's data directory, seen from here."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", default=os.devnull)
    options = parser.parse_args()

    async def run() -> None:
        made = sessions(options.address, options.port, options.folder)
        await Run(made, _say).obey(await _standard_input())

    try:
        asyncio.run(run())
    except (OSError, EOFError, WrongAnswer) as error:
        sys.exit(f"cannot begin with {options.address} port {options.port}: {type(error).__name__} {error}")
