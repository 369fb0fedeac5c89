"""The clients of real services: they tell a wrong answer from a lost connection, and both from a pause."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from labs.clients.redis import Counter, Total
from labs.clients.sessions import Run, Session, expect

Answer = Callable[[int], bytes]


@asynccontextmanager
async def redis(answer: Answer) -> AsyncIterator[int]:
    """A server that answers the n-th command of a connection with `answer(n)`, or closes if that is nothing."""

    serving = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())
        number = 0
        while (head := await reader.readline()).startswith(b"*"):
            for _ in range(2 * int(head[1:])):
                await reader.readline()
            number += 1
            if not (said := answer(number)):
                break
            writer.write(said)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.gather(*filter(None, serving))


def counting(number: int) -> bytes:
    """Of five commands four are INCR and one is INCRBY 4; what comes later is never reached."""
    steps, rest = divmod(number - 1, Counter.AT_ONCE + 1)
    done = Counter.AT_ONCE * (steps + 1)
    return b":%d\r\n" % (done if rest == Counter.AT_ONCE else Counter.AT_ONCE * steps + rest + 1)


async def told(sessions: list[Session]) -> list[dict[str, Any]]:
    """What a run of the sessions says: ready, begin, end (as soon as there is something to tell), stop."""
    said: list[dict[str, Any]] = []
    reader = asyncio.StreamReader()
    run = Run(sessions, lambda event, seen: said.append({"event": event, **json.loads(json.dumps(vars(seen)))}))
    obeying = asyncio.create_task(run.obey(reader))
    reader.feed_data(b"begin\n")
    while not (seen := run.whole_run()).troubles and seen.answers < 50:  # noqa: ASYNC110 - nothing tells
        await asyncio.sleep(0.01)
    reader.feed_data(b"end\nstop\n")
    reader.feed_eof()
    await obeying
    return said


@pytest.mark.parametrize(
    ("answer", "lost", "wrong", "trouble"),
    [
        (lambda n: counting(n + 1 if n > 5 else n), 0, 1, "INCR: '6' where '5' was due"),
        (lambda n: counting(n) if n < 8 else b"", 1, 0, "0 bytes read"),
        (lambda n: counting(n) if n < 8 else b"-ERR no memory\r\n", 0, 1, "ERR no memory"),
    ],
    ids=["an increment done twice", "a connection that is closed", "an error"],
)
async def test_what_goes_wrong_is_counted_once(answer: Answer, lost: int, wrong: int, trouble: str) -> None:
    async with redis(answer) as port:
        ready, _, hop, stop = await told([Counter("127.0.0.1", port, 0, Total())])
    assert (ready["event"], ready["connections"], ready["lost"], ready["wrong"]) == ("ready", 1, 0, 0)
    for seen in (hop, stop):
        assert (seen["lost"], seen["wrong"]) == (lost, wrong)
        assert len(seen["troubles"]) == 1
        assert seen["troubles"][0].startswith("Counter 0: ")
        assert trouble in seen["troubles"][0]


class Quiet(Session):
    """A session without a connection; `finish` finds what it is told to find."""

    interval_s = 0.001

    def __init__(self, found: int) -> None:
        self._found, self.steps = found, 0

    async def open(self) -> None:
        pass

    async def step(self) -> None:
        self.steps += 1

    async def finish(self) -> None:
        expect(self._found, 1, "the last look")


async def test_the_last_look_counts() -> None:
    good, bad = Quiet(1), Quiet(2)
    *_, hop, stop = await told([good, bad])
    assert (hop["wrong"], stop["wrong"], stop["lost"]) == (0, 1, 0)
    assert stop["troubles"] == ["Quiet 1: the last look: '2' where '1' was due"]
    assert stop["answers"] == good.steps + bad.steps > 0
