"""Clients of the lab's Java program: each has a thread of its own there, and both count."""

from __future__ import annotations

import hashlib
import random

from labs.clients.sessions import Session, Stream, WrongAnswer, expect, main

THREADS = 20


class Asker(Session):
    """Asks about a key of its own: thread, counts and digest must be those that are due."""

    interval_s = 0.02

    def __init__(self, address: str, port: int, number: int) -> None:
        self._where, self._number = (address, port), number
        self._count = self._total = 0
        self._thread = ""

    async def open(self) -> None:
        self._stream = await Stream.connect(*self._where)

    async def step(self) -> None:
        self._count += 1
        line = f"key{self._number} {random.randbytes(200).hex()}"
        self._stream.send(f"{line}\n".encode())
        thread, answered, count, total, digest = (await self._stream.line()).split(" ")
        expect(digest, hashlib.sha256(line.encode()).hexdigest(), "the digest")
        expect((answered, count), (str(self._count), str(self._count)), "answers on this connection, and for the key")
        expect(thread, self._thread or thread, "the thread")
        if int(total) <= self._total:
            raise WrongAnswer(f"{total} answers to all, after {self._total}")
        self._thread, self._total = thread, int(total)


def sessions(address: str, port: int, folder: str) -> list[Session]:
    return [Asker(address, port, number) for number in range(THREADS)]


if __name__ == "__main__":
    main(sessions)
