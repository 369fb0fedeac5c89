"""Clients of the lab's node program: requests on kept connections, events by a timer, websockets."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

from labs.clients.sessions import Session, Stream, WrongAnswer, expect, main
from labs.clients.websocket import Websocket


class NodeSession(Session):
    """A kept HTTP connection."""

    def __init__(self, address: str, port: int) -> None:
        self._where, self._count = (address, port), 0

    async def open(self) -> None:
        self._stream = await Stream.connect(*self._where)

    async def ask(self, method: str, path: str, body: bytes = b"") -> dict[str, str]:
        """Send a request; the headers of its answer."""
        head = [f"{method} {path} HTTP/1.1", "Host: lab", f"Content-Length: {len(body)}", "", ""]
        self._stream.send("\r\n".join(head).encode() + body)
        first, *rest = (await self._stream.until(b"\r\n\r\n")).decode().splitlines()
        if first.split()[1] != "200":
            raise WrongAnswer(f"{method} {path}: {first}")
        return dict(line.lower().split(": ", 1) for line in rest if line)

    async def answer(self, method: str, path: str, body: bytes = b"") -> str:
        headers = await self.ask(method, path, body)
        return (await self._stream.exactly(int(headers["content-length"]))).decode()


class Counter(NodeSession):
    """The service counts the requests of each connection, and all of them."""

    _total = 0

    async def step(self) -> None:
        self._count += 1
        count, total = map(int, (await self.answer("GET", "/count")).split())
        expect(count, self._count, "requests of this connection")
        if total <= self._total:
            raise WrongAnswer(f"{total} requests of all connections, after {self._total}")
        self._total = total


class Sender(NodeSession):
    """Sends data; the service answers with their digest, and a thread of it with a square."""

    async def step(self) -> None:
        body = random.randbytes(random.randrange(1, 50_000))
        due = f"{hashlib.sha256(body).hexdigest()} {len(body) ** 2}"
        expect(await self.answer("POST", "/digest", body), due, "the digest")


class File(NodeSession):
    """The service writes to a file and reads it."""

    interval_s = 0.05

    async def step(self) -> None:
        self._count += 1
        expect(await self.answer("GET", "/file"), str(self._count), "lines in the file")


class Events(NodeSession):
    """A stream of numbered events, one every 20 ms."""

    interval_s = 0.0

    async def open(self) -> None:
        await super().open()
        await self.ask("GET", "/events")

    async def step(self) -> None:
        self._count += 1
        size = int(await self._stream.line(), 16)
        expect(await self._stream.exactly(size + 2), b"data: %d\n\n\r\n" % self._count, "the event")


def sessions(address: str, port: int, folder: str) -> list[Session]:
    kinds: list[Callable[[str, int], Session]]
    kinds = [*[Counter] * 4, Sender, Sender, File, Events, Events, *[Websocket] * 4]
    return [kind(address, port) for kind in kinds]


if __name__ == "__main__":
    main(sessions)
