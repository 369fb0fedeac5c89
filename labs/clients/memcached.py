"""Clients of memcached (text protocol): counters, compare and swap, and large values."""

from __future__ import annotations

from collections.abc import Callable

from labs.clients.sessions import Session, Stream, WrongAnswer, expect, main

LARGE_BYTES = 200_000


class MemcachedSession(Session):
    """One connection; https://github.com/memcached/memcached/blob/master/doc/protocol.txt"""

    def __init__(self, address: str, port: int, number: int) -> None:
        self._where = (address, port)
        self._number, self._count = number, 0

    async def open(self) -> None:
        self._stream = await Stream.connect(*self._where, limit=2 * LARGE_BYTES)

    async def store(self, verb: str, key: str, value: str, unique: str = "") -> str:
        self._stream.send(f"{verb} {key} 0 0 {len(value)}{unique and ' '}{unique}\r\n{value}\r\n".encode())
        return await self._stream.line()

    async def fetch(self, key: str) -> tuple[str, str]:
        """The value and its unique number."""
        self._stream.send(f"gets {key}\r\n".encode())
        line = await self._stream.line()
        words = line.split()
        if len(words) != 5 or words[:2] != ["VALUE", key]:
            raise WrongAnswer(f"gets {key}: {line!r}")
        value = (await self._stream.exactly(int(words[3]) + 2))[:-2].decode()
        expect(await self._stream.line(), "END", f"gets {key}")
        return value, words[4]


class Counter(MemcachedSession):
    """Counts by incr, some at once on the connection: each answer is the next number."""

    AT_ONCE = 4

    async def open(self) -> None:
        await super().open()
        expect(await self.store("set", f"counter{self._number}", "0"), "STORED", "set")

    async def step(self) -> None:
        for _ in range(self.AT_ONCE):
            self._stream.send(f"incr counter{self._number} 1\r\n".encode())
        for _ in range(self.AT_ONCE):
            self._count += 1
            expect(await self._stream.line(), str(self._count), "incr")

    async def finish(self) -> None:
        value, _ = await self.fetch(f"counter{self._number}")
        expect(value.strip(), str(self._count), "the counter at the end")


class Swapper(MemcachedSession):
    """Compare and swap: the number of the value is the one that it was given, before a move as after it."""

    async def open(self) -> None:
        await super().open()
        key = f"swapped{self._number}"
        expect(await self.store("set", key, "0"), "STORED", "set")
        _, self._unique = await self.fetch(key)

    async def step(self) -> None:
        key = f"swapped{self._number}"
        self._count += 1
        expect(await self.store("cas", key, str(self._count), self._unique), "STORED", "cas")
        expect(await self.store("cas", key, "stale", self._unique), "EXISTS", "cas with the number of before")
        value, self._unique = await self.fetch(key)
        expect(value, str(self._count), "gets")


class Large(MemcachedSession):
    """Writes and reads values of 200 kB."""

    interval_s = 0.05

    async def step(self) -> None:
        self._count += 1
        value = f"{self._count:08d}" * (LARGE_BYTES // 8)
        expect(await self.store("set", "large", value), "STORED", "set")
        expect((await self.fetch("large"))[0], value, "gets")


def sessions(address: str, port: int, folder: str) -> list[Session]:
    kinds: list[Callable[[str, int, int], Session]] = [*[Counter] * 8, Swapper, Swapper, Large]
    return [kind(address, port, number) for number, kind in enumerate(kinds)]


if __name__ == "__main__":
    main(sessions)
