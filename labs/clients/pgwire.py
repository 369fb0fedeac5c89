"""PostgreSQL's protocol, version 3: https://www.postgresql.org/docs/current/protocol.html"""

from __future__ import annotations

import struct

from labs.clients.sessions import Stream, WrongAnswer

VERSION_3 = 196608


class Postgres:
    """One connection. An error that the server reports is a `WrongAnswer`: no transaction may fail."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.notifications: list[str] = []
        """The payloads of notifications that came and were not taken yet."""

    @classmethod
    async def connect(cls, address: str, port: int) -> Postgres:
        postgres = cls(await Stream.connect(address, port))
        parameters = b"user\0postgres\0database\0postgres\0\0"
        postgres._stream.send(struct.pack("!II", 8 + len(parameters), VERSION_3) + parameters)
        await postgres.ready()
        return postgres

    def send(self, kind: str, body: bytes = b"") -> None:
        self._stream.send(kind.encode() + struct.pack("!I", 4 + len(body)) + body)

    async def drained(self) -> None:
        await self._stream.drained()

    async def receive(self) -> tuple[str, bytes]:
        """Kind and body of the next message that is an answer."""
        while True:
            kind, size = struct.unpack("!cI", await self._stream.exactly(5))
            body = await self._stream.exactly(size - 4)
            match kind:
                case b"E":
                    fields = [field.decode() for field in body.split(b"\0") if field]
                    raise WrongAnswer("; ".join(field[1:] for field in fields if field[0] in "SCM"))
                case b"A":
                    self.notifications.append(body[4:].split(b"\0")[1].decode())
                case b"N" | b"S":  # a notice, a changed setting
                    pass
                case _:
                    return kind.decode(), body

    async def ready(self) -> list[list[str]]:
        """Take answers until the server waits for the next question: the rows among them."""
        rows: list[list[str]] = []
        while True:
            kind, body = await self.receive()
            if kind == "Z":
                return rows
            if kind == "D":
                rows.append(_values(body))

    async def ask(self, query: str) -> list[list[str]]:
        """Run a query, or several; the rows of all answers."""
        self.send("Q", query.encode() + b"\0")
        return await self.ready()

    async def notification(self) -> str:
        """Wait for the next notification."""
        while not self.notifications:
            kind, size = struct.unpack("!cI", await self._stream.exactly(5))
            body = await self._stream.exactly(size - 4)
            if kind != b"A":
                raise WrongAnswer(f"message {kind!r} where a notification was due")
            self.notifications.append(body[4:].split(b"\0")[1].decode())
        return self.notifications.pop(0)


def _values(body: bytes) -> list[str]:
    (count,) = struct.unpack_from("!H", body)
    values, at = [], 2
    for _ in range(count):
        (size,) = struct.unpack_from("!i", body, at)
        at += 4
        values.append(body[at : at + size].decode() if size >= 0 else "")
        at += max(size, 0)
    return values
