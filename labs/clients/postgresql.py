"""Clients of PostgreSQL: the load of pgbench, and everything that lives as long as a transaction or a connection."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

from labs.clients.pgwire import Postgres
from labs.clients.sessions import Session, WrongAnswer, expect, main

SUMS = {"branches": "balance", "tellers": "balance", "accounts": "balance", "history": "delta"}


@dataclass
class Books:
    """What all sessions together have done to the balances."""

    transactions: int = 0
    total: int = 0


class PostgresSession(Session):
    def __init__(self, address: str, port: int, number: int, books: Books) -> None:
        self._where = (address, port)
        self._number, self._books, self._count = number, books, 0

    async def open(self) -> None:
        self._postgres = await Postgres.connect(*self._where)


class Banker(PostgresSession):
    """pgbench's TPC-B-like transaction, one statement after the other. At the end all sums must agree."""

    async def step(self) -> None:
        aid, tid, delta = random.randint(1, 10000), random.randint(1, 10), random.randint(-5000, 5000)
        await self._postgres.ask("BEGIN")
        await self._postgres.ask(f"UPDATE accounts SET balance = balance + {delta} WHERE aid = {aid}")
        rows = await self._postgres.ask(f"SELECT balance FROM accounts WHERE aid = {aid}")
        expect(len(rows), 1, "accounts of that number")
        await self._postgres.ask(f"UPDATE tellers SET balance = balance + {delta} WHERE tid = {tid}")
        await self._postgres.ask(f"UPDATE branches SET balance = balance + {delta} WHERE bid = 1")
        await self._postgres.ask(f"INSERT INTO history VALUES ({tid}, {aid}, {delta}, now())")
        await self._postgres.ask("COMMIT")
        self._books.transactions += 1
        self._books.total += delta

    async def finish(self) -> None:
        for table, column in SUMS.items():
            rows = await self._postgres.ask(f"SELECT sum({column}) FROM {table}")
            expect(rows, [[str(self._books.total)]], f"the sum of {table} at the end")
        rows = await self._postgres.ask("SELECT count(*) FROM history")
        expect(rows, [[str(self._books.transactions)]], "transactions at the end")


class Prepared(PostgresSession):
    """A statement that was prepared once, executed in every step (the extended query protocol)."""

    async def open(self) -> None:
        await super().open()
        self._postgres.send("P", b"doubled\0SELECT $1::int * 2\0\0\0")
        self._postgres.send("S")
        await self._postgres.ready()

    async def step(self) -> None:
        self._count += 1
        value = str(self._count).encode()
        parameter = struct.pack("!HHi", 0, 1, len(value)) + value
        self._postgres.send("B", b"\0doubled\0" + parameter + b"\0\0")
        self._postgres.send("E", b"\0\0\0\0\0")
        self._postgres.send("S")
        expect(await self._postgres.ready(), [[str(2 * self._count)]], "the prepared statement")


class OpenTransaction(PostgresSession):
    """One transaction from the beginning to the end, with a temporary table, a cursor and a savepoint."""

    async def open(self) -> None:
        await super().open()
        await self._postgres.ask(
            "BEGIN; CREATE TEMPORARY TABLE mine (number int) ON COMMIT DROP;"
            "DECLARE walk CURSOR FOR SELECT generate_series(1, 100000000)"
        )

    async def step(self) -> None:
        self._count += 1
        await self._postgres.ask(f"SAVEPOINT step; INSERT INTO mine VALUES ({self._count}); RELEASE step")
        rows = await self._postgres.ask("SELECT count(*), sum(number) FROM mine")
        expect(rows, [[str(self._count), str(self._count * (self._count + 1) // 2)]], "the temporary table")
        expect(await self._postgres.ask("FETCH 1 FROM walk"), [[str(self._count)]], "the cursor")

    async def finish(self) -> None:
        await self._postgres.ask("COMMIT")


class Listener(PostgresSession):
    """LISTEN on one connection, NOTIFY on another: every notification comes, once and in order."""

    connections = 2

    async def open(self) -> None:
        await super().open()
        self._notifying = await Postgres.connect(*self._where)
        await self._postgres.ask(f"LISTEN lab{self._number}")

    async def step(self) -> None:
        self._count += 1
        await self._notifying.ask(f"NOTIFY lab{self._number}, '{self._count}'")
        expect(await self._postgres.notification(), str(self._count), "the notification")


class Locker(PostgresSession):
    """Holds an advisory lock that another connection cannot get, until the end."""

    connections = 2

    async def open(self) -> None:
        await super().open()
        self._other = await Postgres.connect(*self._where)
        await self._postgres.ask("SELECT pg_advisory_lock(1)")

    async def step(self) -> None:
        expect(await self._other.ask("SELECT pg_try_advisory_lock(1)"), [["f"]], "the lock that another has")

    async def finish(self) -> None:
        expect(await self._postgres.ask("SELECT pg_advisory_unlock(1)"), [["t"]], "to let go of the lock")
        expect(await self._other.ask("SELECT pg_try_advisory_lock(1)"), [["t"]], "the lock that is free")


class CopyIn(PostgresSession):
    """COPY FROM STDIN, under way all the time: at the end every row is in the table."""

    ROWS_A_STEP = 20

    async def open(self) -> None:
        await super().open()
        self._postgres.send("Q", b"COPY copied FROM STDIN\0")
        expect((await self._postgres.receive())[0], "G", "the answer to COPY FROM STDIN")

    async def step(self) -> None:
        rows = range(self._count + 1, self._count + self.ROWS_A_STEP + 1)
        self._postgres.send("d", b"".join(b"%d\tword%d\n" % (number, number) for number in rows))
        await self._postgres.drained()
        self._count += self.ROWS_A_STEP

    async def finish(self) -> None:
        self._postgres.send("c")
        await self._postgres.ready()
        rows = await self._postgres.ask("SELECT count(*), sum(number), count(DISTINCT word) FROM copied")
        due = [str(self._count), str(self._count * (self._count + 1) // 2), str(self._count)]
        expect(rows, [due], "the rows that were copied")


class CopyOut(PostgresSession):
    """COPY TO STDOUT, read slowly, every row checked."""

    ROWS_A_STEP = 100

    async def open(self) -> None:
        await super().open()
        # A series in FROM would be made whole before its first row is sent.
        query = "SELECT n, md5(n::text) FROM (SELECT generate_series(1, 100000000) AS n) AS series"
        self._postgres.send("Q", f"COPY ({query}) TO STDOUT\0".encode())
        expect((await self._postgres.receive())[0], "H", "the answer to COPY TO STDOUT")

    async def step(self) -> None:
        for _ in range(self.ROWS_A_STEP):
            self._count += 1
            kind, row = await self._postgres.receive()
            if kind != "d":
                raise WrongAnswer(f"message {kind!r} in the middle of a COPY")
            digest = hashlib.md5(str(self._count).encode(), usedforsecurity=False).hexdigest()
            expect(row.decode(), f"{self._count}\t{digest}\n", "the row")


def sessions(address: str, port: int, folder: str) -> list[Session]:
    books = Books()
    kinds: list[Callable[..., Session]]
    kinds = [*[Banker] * 6, Prepared, OpenTransaction, Listener, Locker, CopyIn, CopyOut]
    return [kind(address, port, number, books) for number, kind in enumerate(kinds)]


if __name__ == "__main__":
    main(sessions)
