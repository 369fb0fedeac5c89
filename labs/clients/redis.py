"""Clients of redis (RESP2): counters, transactions, publish and subscribe, and large values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from labs.clients.sessions import Session, Stream, WrongAnswer, expect, main

LARGE_BYTES = 200_000
Reply = int | str | list["Reply"] | None


class Redis:
    """One connection; https://redis.io/docs/latest/develop/reference/protocol-spec/"""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    @classmethod
    async def connect(cls, address: str, port: int) -> Redis:
        return cls(await Stream.connect(address, port, limit=2 * LARGE_BYTES))

    def send(self, *words: str | int) -> None:
        parts = [str(word).encode() for word in words]
        body = b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
        self._stream.send(b"*%d\r\n%s" % (len(parts), body))

    async def reply(self) -> Reply:
        line = await self._stream.line()
        kind, rest = line[0], line[1:]
        if kind == "+":
            return rest
        if kind == ":":
            return int(rest)
        if kind == "$":
            size = int(rest)
            return None if size < 0 else (await self._stream.exactly(size + 2))[:-2].decode()
        if kind == "*":
            return [await self.reply() for _ in range(int(rest))]
        raise WrongAnswer(f"redis said {line!r}")

    async def ask(self, *words: str | int) -> Reply:
        self.send(*words)
        return await self.reply()


@dataclass
class Total:
    """What all sessions have added to the one counter that they share."""

    sum: int = 0


class RedisSession(Session):
    def __init__(self, address: str, port: int, number: int, total: Total) -> None:
        self._where = (address, port)
        self._number, self._total, self._count = number, total, 0

    async def open(self) -> None:
        self._redis = await Redis.connect(*self._where)


class Counter(RedisSession):
    """Counts by INCR, some at once on the connection, each answer the next number: none is lost, none done twice."""

    AT_ONCE = 4

    async def step(self) -> None:
        for _ in range(self.AT_ONCE):
            self._redis.send("INCR", f"counter:{self._number}")
        self._redis.send("INCRBY", "total", self.AT_ONCE)
        for _ in range(self.AT_ONCE):
            self._count += 1
            expect(await self._redis.reply(), self._count, "INCR")
        self._total.sum += self.AT_ONCE
        total = await self._redis.reply()
        if not isinstance(total, int) or total < self._count:
            raise WrongAnswer(f"INCRBY: {total!r} after {self._count} by this client alone")

    async def finish(self) -> None:
        expect(await self._redis.ask("GET", f"counter:{self._number}"), str(self._count), "the counter at the end")
        expect(await self._redis.ask("GET", "total"), str(self._total.sum), "the shared counter at the end")


class Transaction(RedisSession):
    """A transaction that stays open over many steps, and a watched key."""

    STEPS = 20
    _queued = 0

    async def step(self) -> None:
        if self._queued == 0:
            expect(await self._redis.ask("WATCH", "transaction"), "OK", "WATCH")
            expect(await self._redis.ask("MULTI"), "OK", "MULTI")
        expect(await self._redis.ask("INCR", "transaction"), "QUEUED", "INCR in a transaction")
        self._queued += 1
        if self._queued == self.STEPS:
            due = list(range(self._count + 1, self._count + self.STEPS + 1))
            expect(await self._redis.ask("EXEC"), due, "EXEC")
            self._count, self._queued = self._count + self.STEPS, 0


class Subscriber(RedisSession):
    """Publishes on one connection and is subscribed on the other: every message comes, once and in order."""

    connections = 2

    async def open(self) -> None:
        await super().open()
        self._subscribed = await Redis.connect(*self._where)
        channel = f"channel:{self._number}"
        expect(await self._subscribed.ask("SUBSCRIBE", channel), ["subscribe", channel, 1], "SUBSCRIBE")

    async def step(self) -> None:
        channel = f"channel:{self._number}"
        self._count += 1
        expect(await self._redis.ask("PUBLISH", channel, self._count), 1, "PUBLISH")
        expect(await self._subscribed.reply(), ["message", channel, str(self._count)], "the subscriber's message")


class Waiting(RedisSession):
    """One connection waits in BLPOP, mostly, for what the other pushes."""

    connections = 2
    interval_s = 0.05

    async def open(self) -> None:
        await super().open()
        self._pushing = await Redis.connect(*self._where)
        self._redis.send("BLPOP", "queue", 0)

    async def step(self) -> None:
        self._count += 1
        await self._pushing.ask("RPUSH", "queue", self._count)
        expect(await self._redis.reply(), ["queue", str(self._count)], "BLPOP")
        self._redis.send("BLPOP", "queue", 0)


class Large(RedisSession):
    """Writes and reads values of 200 kB."""

    interval_s = 0.05

    async def step(self) -> None:
        self._count += 1
        value = f"{self._count:08d}" * (LARGE_BYTES // 8)
        expect(await self._redis.ask("SET", "large", value), "OK", "SET")
        expect(await self._redis.ask("GET", "large"), value, "GET")


class Aof(RedisSession):
    """At the end: what redis reads back from its append-only file is what it has in memory."""

    interval_s = 0.1

    async def step(self) -> None:
        expect(await self._redis.ask("PING"), "PONG", "PING")

    async def finish(self) -> None:
        before = await self._redis.ask("DEBUG", "DIGEST")
        expect(await self._redis.ask("DEBUG", "LOADAOF"), "OK", "DEBUG LOADAOF")
        expect(await self._redis.ask("DEBUG", "DIGEST"), before, "the data set in the append-only file")
        expect(await self._redis.ask("GET", "total"), str(self._total.sum), "the shared counter in the file")


def sessions(address: str, port: int, folder: str) -> list[Session]:
    total = Total()
    kinds: list[Callable[..., Session]]
    kinds = [*[Counter] * 8, Transaction, Subscriber, Subscriber, Waiting, Large, Aof]
    return [kind(address, port, number, total) for number, kind in enumerate(kinds)]


if __name__ == "__main__":
    main(sessions)
