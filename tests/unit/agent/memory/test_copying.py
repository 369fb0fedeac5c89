"""The source's side of memory over scripted trackers: rounds, what they name, their end, and fetching."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from coordinator.agent.channel import Channel
from coordinator.agent.fakes.channel import FakeChannel, fake_channel
from coordinator.agent.memory.base import (
    NO_FILES,
    PAGE_BYTES,
    Backing,
    Changes,
    HeldFiles,
    Mapping,
    PageRun,
    ProcessChanges,
)
from coordinator.agent.memory.copying import MemorySource, lazy_runs
from coordinator.agent.memory.pages import PageData
from coordinator.agent.messages import (
    ChannelMessage,
    DroppedPages,
    FetchedPages,
    FetchPages,
    GiveUp,
    Go,
    PageBatch,
    ProcessGone,
    RoundEnd,
    RoundStored,
    Staged,
)
from coordinator.errors import (
    ChannelFailed,
    DumpFailed,
    MemoryLost,
    NotConverging,
    PeerAborted,
    ProtocolError,
    TrackingFailed,
)
from coordinator.protocol import GiveUpMode, MemoryPolicy, Mode

P = PAGE_BYTES
PRIVATE = Mapping(0, 100 * P, "rw-p", Backing.ANONYMOUS, 0, "0", 0, "")
SHARED = Mapping(200 * P, 300 * P, "rw-s", Backing.SHMEM, 0, "0:1", 5, "/dev/shm/x")


def changes(dirty: Iterable[PageRun] = (), dropped: Iterable[PageRun] = ()) -> Changes:
    return Changes(tuple(dirty), tuple(dropped), (PRIVATE, SHARED), 0)


def process(
    dirty: Iterable[int] = (), dropped: Iterable[int] = (), *, pid: int = 100, fresh: bool = False
) -> ProcessChanges:
    """Pages by number; the pid in the images is a hundred less."""
    runs = [[PageRun(number * P, 1) for number in numbers] for numbers in (dirty, dropped)]
    return ProcessChanges(pid, pid - 99, pid, fresh, changes(*runs))


class Script:
    """Trackers that answer one after the other, then with nothing; `gone` is what each answer names as gone."""

    def __init__(self, *answers: list[ProcessChanges], gone: Iterable[tuple[int, ...]] = ()) -> None:
        self._answers = iter(answers)
        self._gone = iter(gone)
        self.asked: list[bool] = []
        self.closed = 0
        self.before: Callable[[], None] = lambda: None

    def collect(self, *, last: bool = False, files: HeldFiles = NO_FILES) -> dict[int, ProcessChanges]:
        self.before()
        self.asked.append(last)
        return {each.pid: each for each in next(self._answers, [])}

    def take_gone(self) -> tuple[int, ...]:
        return next(self._gone, ())

    at_freeze = None

    def close(self) -> None:
        self.closed += 1


def read(pid: int, runs: Iterable[PageRun]) -> Iterator[PageData]:
    """A page is full of its number; page 66 has vanished."""
    for run in runs:
        gone = run.start == 66 * P
        data = b"" if gone else b"".join(bytes([(run.start // P + n) % 256]) * P for n in range(run.pages))
        yield PageData(() if gone else (run,), memoryview(data), (run,) if gone else ())


def source(
    script: Script,
    mode: Mode = "pre-copy",
    give_up: GiveUpMode = "freeze",
    max_rounds: int = 12,
    alive: Callable[[int], int | None] = lambda pid: pid,
) -> MemorySource:
    time = iter(range(1000))
    return MemorySource(
        MemoryPolicy(mode=mode, give_up=give_up, max_rounds=max_rounds),
        lambda _: script,
        clock=lambda: next(time) / 1000,
        read=read,
        processes=lambda _: {1: 100, 2: 101},
        started=alive,
    )


async def copied(memory: MemorySource) -> list[ChannelMessage]:
    """Copy to a destination that stores every round; what it was sent."""
    here, there = fake_channel()
    said: list[ChannelMessage] = []
    storing = asyncio.ensure_future(store(there, said))
    try:
        await memory.copy(100, here, lambda *_: None)
    finally:
        storing.cancel()
        await asyncio.wait((storing,))
        said += [message for message, _ in there._arrived]
    return said


async def store(link: Channel, said: list[ChannelMessage]) -> None:
    while True:
        message, _ = await link.receive()
        said.append(message)
        if isinstance(message, RoundEnd):
            await link.send(RoundStored(n=message.n))


async def sent_last(memory: MemorySource) -> list[ChannelMessage]:
    here, there = fake_channel()
    await memory.last(100, here)
    return [message for message, _ in there._arrived]


def batch(*numbers: int, pid: int = 1) -> PageBatch:
    return PageBatch(pid=pid, starts=tuple(number * P for number in numbers), counts=(1,) * len(numbers))


def dropped(*numbers: int, pid: int = 1) -> DroppedPages:
    return DroppedPages(pid=pid, starts=tuple(number * P for number in numbers), counts=(1,) * len(numbers))


async def test_a_round_is_followed_by_one_with_what_was_found_at_its_end() -> None:
    script = Script([process([1, 2])], [process([2])])
    memory = source(script)
    assert await copied(memory) == [batch(1), batch(2), RoundEnd(n=1), batch(2), RoundEnd(n=2)]
    assert script.asked == [False, False]
    assert [(each.n, each.pages, each.bytes) for each in memory.report.rounds] == [(1, 2, 2 * P), (2, 1, P)]
    assert memory.report.pre_copy_bytes == 3 * P


async def test_fresh_gone_dropped_and_vanished() -> None:
    """What was kept of a pid is forgotten before its new process's pages come."""
    script = Script(
        [process([1], fresh=True)], [process([66], [5]), process([3], pid=101, fresh=True)], gone=[(), (2,)]
    )
    first, second = (
        [ProcessGone(pid=1), batch(1), RoundEnd(n=1)],
        [
            ProcessGone(pid=2),
            dropped(5),
            PageBatch(pid=1, starts=(), counts=()),
            dropped(66),
            ProcessGone(pid=2),
            batch(3, pid=2),
            RoundEnd(n=2),
        ],
    )
    assert await copied(source(script)) == first + second


def test_only_what_criu_leaves_to_its_daemon_is_sent() -> None:
    runs = [PageRun(3 * P, 2), PageRun(210 * P, 4)]
    assert lazy_runs(changes(runs)) == runs[:1]
    assert lazy_runs(Changes(tuple(runs), (), (), 0)) == []


@pytest.mark.parametrize(("give_up", "mode"), [("freeze", "pre-copy"), ("post-copy", "hybrid")])
async def test_giving_up(give_up: GiveUpMode, mode: Mode) -> None:
    busy = [process(range(100)) for _ in range(20)]
    memory = source(Script(*([each] for each in busy)), give_up=give_up, max_rounds=1)
    memory._policy = MemoryPolicy(mode="pre-copy", give_up=give_up, max_rounds=1, max_freeze_ms=1e-6)
    await copied(memory)
    assert memory.mode == mode
    assert memory.fetched_later == (mode == "hybrid")
    assert memory.report.decision is not None
    assert memory.report.decision.kind == "give_up"


async def test_giving_up_by_an_abort_says_why() -> None:
    memory = source(Script(*([process(range(100))] for _ in range(20))))
    memory._policy = MemoryPolicy(mode="pre-copy", give_up="abort", max_rounds=1, max_freeze_ms=1e-6)
    with pytest.raises(NotConverging, match="1 rounds were not enough"):
        await copied(memory)


async def test_a_mode_without_rounds_tracks_nothing() -> None:
    for mode in ("stop-copy", "post-copy"):
        script = Script()
        assert await copied(source(script, mode)) == []
        assert script.asked == []


async def test_the_last_pages_are_sent_from_the_frozen_tasks() -> None:
    script = Script([process([1])], [], [process([2, 210], [3])])
    memory = source(script)
    await copied(memory)
    assert await sent_last(memory) == [dropped(3), batch(2)]
    assert script.asked[-1] is True
    assert memory.report.last_bytes == P


async def test_what_is_fetched_later_is_forgotten_by_the_destination() -> None:
    """And of a process that is fresh, everything: what it no longer has is named by nobody."""
    script = Script([process([1])], [], [process([2], [3]), process([4], pid=101, fresh=True)])
    memory = source(script, "hybrid")
    await copied(memory)
    assert await sent_last(memory) == [dropped(2, 3), ProcessGone(pid=2), dropped(4, pid=2)]
    assert memory.report.last_bytes == 0


async def asked(memory: MemorySource, *messages: ChannelMessage) -> FakeChannel:
    here, there = fake_channel()
    for message in messages:
        await there.send(message)
    await memory.serve_until(here, Staged)
    return there


async def test_pages_are_served_until_the_word_comes() -> None:
    memory = source(Script(), "post-copy")
    await sent_last(memory)
    wanted = FetchPages(number=7, pid=2, address=65 * P, count=3)
    there = await asked(memory, wanted, Staged())
    assert await there.receive() == (FetchedPages(number=7), b"A" * P + b"B" * P + b"C" * P)
    gap = await asked(memory, FetchPages(number=8, pid=1, address=66 * P, count=1), Staged())
    assert await gap.receive() == (FetchedPages(number=8), bytes(P))  # of a task that is there: it holds nothing


async def test_a_frozen_task_that_is_gone_is_not_taken_for_zeroes() -> None:
    alive = {100: 1, 101: 1}
    memory = source(Script(), "post-copy", alive=alive.get)
    await sent_last(memory)
    alive.clear()
    for pid in (1, 3):
        with pytest.raises(MemoryLost, match=f"process {pid} is gone"):
            await asked(memory, FetchPages(number=1, pid=pid, address=0, count=1))


@pytest.mark.parametrize(
    ("message", "error"),
    [(GiveUp(error=DumpFailed("x").to_wire()), PeerAborted), (Go(), ProtocolError), (None, ChannelFailed)],
)
async def test_other_words_end_the_serving(message: ChannelMessage | None, error: type[Exception]) -> None:
    here, there = fake_channel()
    if message is None:
        there.cut()
    else:
        await there.send(message)
    with pytest.raises(error):
        await source(Script(), "post-copy").serve_until(here, Staged)


async def test_nobody_may_fetch_what_was_copied_before() -> None:
    with pytest.raises(ProtocolError):
        await asked(source(Script()), FetchPages(number=1, pid=1, address=0, count=1))


async def test_cancelled_while_a_thread_collects_the_trackers_are_closed_after_it() -> None:
    entered, leave = threading.Event(), threading.Event()
    script = Script([process([1])])

    def before() -> None:
        entered.set()
        assert leave.wait(20)

    script.before = before
    memory = source(script)
    copying = asyncio.ensure_future(copied(memory))
    await asyncio.to_thread(entered.wait, 20)
    copying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copying
    closing = asyncio.ensure_future(memory.close())
    await asyncio.sleep(0)
    assert script.closed == 0
    leave.set()
    await closing
    await memory.close()
    assert script.closed == 1


async def test_cancelled_while_tracking_begins_nothing_stays_in_the_tasks() -> None:
    entered, leave = threading.Event(), threading.Event()
    script = Script()

    def track(_: int) -> Any:
        entered.set()
        assert leave.wait(20)
        return script

    memory = MemorySource(MemoryPolicy(mode="pre-copy"), track, clock=lambda: 0.0)
    copying = asyncio.ensure_future(copied(memory))
    await asyncio.to_thread(entered.wait, 20)
    copying.cancel()
    await asyncio.wait((copying,))
    leave.set()
    await memory.close()
    assert script.closed == 1


async def test_what_cannot_be_tracked_is_told_and_close_is_harmless() -> None:
    def track(_: int) -> Any:
        raise TrackingFailed("it forbids tracing")

    memory = MemorySource(MemoryPolicy(mode="pre-copy"), track, clock=lambda: 0.0)
    with pytest.raises(TrackingFailed):
        await copied(memory)
    await memory.close()
