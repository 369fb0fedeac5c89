"""Clients of nginx (HTTP/1.1): pages on kept connections, some at once, ranges, slow downloads, and websockets."""

from __future__ import annotations

import random
from collections.abc import Callable

from labs.clients.sessions import Session, Stream, WrongAnswer, expect, main
from labs.clients.websocket import Websocket

PAGES = 100
LINE_BYTES = 16
LARGE_LINES = 1 << 22
"""The large file: that many lines, each its number in 15 digits."""


def page(number: int) -> bytes:
    """What the catalogue has put there."""
    return f"page {number}\n".encode() * (number + 1)


def lines(first: int, end: int) -> bytes:
    """A part of the large file."""
    return b"".join(b"%015d\n" % number for number in range(first, end))


class HttpSession(Session):
    """A kept connection."""

    def __init__(self, address: str, port: int) -> None:
        self._where = (address, port)

    async def open(self) -> None:
        self._stream = await Stream.connect(*self._where)

    def ask(self, path: str, *headers: str) -> None:
        self._stream.send("\r\n".join([f"GET {path} HTTP/1.1", "Host: lab", *headers, "", ""]).encode())

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the next answer."""
        first, *rest = (await self._stream.until(b"\r\n\r\n")).decode().splitlines()
        headers = dict(line.lower().split(": ", 1) for line in rest if line)
        if headers.get("connection") == "close":
            raise WrongAnswer(f"nginx wants to close the connection: {first}")
        return int(first.split()[1]), headers


class Reader(HttpSession):
    """Asks for pages, several at once, and for those that are unchanged, moved or missing."""

    async def step(self) -> None:
        wanted = random.sample(range(PAGES), 3)
        for number in wanted:
            self.ask(f"/page{number}")
        self.ask("/missing")
        self.ask("/moved")
        for number in wanted:
            status, headers = await self.head()
            expect(status, 200, "status")
            expect(await self._stream.exactly(int(headers["content-length"])), page(number), f"page {number}")
        status, headers = await self.head()
        await self._stream.exactly(int(headers["content-length"]))
        expect(status, 404, "status of a page that is not there")
        status, headers = await self.head()
        await self._stream.exactly(int(headers["content-length"]))
        expect((status, headers["location"]), (301, "http://lab/page"), "a page that has moved")


class Ranger(HttpSession):
    """Asks for parts of the large file."""

    async def step(self) -> None:
        first = random.randrange(LARGE_LINES - 2000)
        self.ask("/large", f"Range: bytes={first * LINE_BYTES}-{(first + 2000) * LINE_BYTES - 1}")
        status, headers = await self.head()
        expect((status, headers["content-length"]), (206, str(2000 * LINE_BYTES)), "a part of the file")
        expect(await self._stream.exactly(2000 * LINE_BYTES), lines(first, first + 2000), "its bytes")


class Downloader(HttpSession):
    """Downloads 64 MiB slowly, checking every byte, and again when it has them all."""

    LINES_A_STEP = 1024
    _next = 0

    async def step(self) -> None:
        if self._next == 0:
            self.ask("/large")
            status, headers = await self.head()
            expect((status, headers["content-length"]), (200, str(LARGE_LINES * LINE_BYTES)), "the large file")
        end = self._next + self.LINES_A_STEP
        expect(await self._stream.exactly(self.LINES_A_STEP * LINE_BYTES), lines(self._next, end), "the download")
        self._next = end % LARGE_LINES


def sessions(address: str, port: int, folder: str) -> list[Session]:
    kinds: list[Callable[[str, int], Session]] = [*[Reader] * 6, Ranger, Ranger, *[Downloader] * 4, *[Websocket] * 3]
    return [kind(address, port) for kind in kinds]


if __name__ == "__main__":
    main(sessions)
