"""The destination's side of memory: the real filler, the real guard, and a task with missing memory like CRIU's."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.agent.memory.filler import AROUND_PAGES
from coordinator.agent.memory.filling import StoredMemory, hot_groups
from coordinator.agent.memory.pagemap_images import LAZY, Entry
from coordinator.agent.memory.store import PAGE_BYTES
from coordinator.agent.messages import DroppedPages, Go, PageBatch, ProcessGone, RoundEnd
from coordinator.errors import ChannelFailed, MemoryLost, NotEnoughSpace, RestoreFailed
from tests.unit.agent.memory import restored_task
from tests.unit.agent.memory.pagemaps import serialize
from tests.unit.agent.memory.restored_task import PID

P = PAGE_BYTES
#: Where the task has its memory; far from everything else.
BASE = 0x3000_0000_0000
FAR = BASE + 0x1000_0000


WRITTEN = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 300), st.integers(1, 90)), max_size=8)


@given(WRITTEN, st.integers(1, 40))
def test_hot_are_the_groups_of_what_was_written_each_once(written: list[tuple[int, int, int]], most: int) -> None:
    hot = hot_groups(((pid, range(first, first + count)) for pid, first, count in written), most)
    groups = [(pid, page) for pid, runs in hot.items() for first, count in runs for page in range(first, first + count)]
    assert len(groups) == len(set(groups)) <= most * AROUND_PAGES
    assert all(first % AROUND_PAGES == count % AROUND_PAGES == 0 for runs in hot.values() for first, count in runs)
    pages = {(pid, page) for pid, first, count in written for page in range(first, first + count)}
    wanted = {(pid, page // AROUND_PAGES) for pid, page in pages}
    assert {(pid, page // AROUND_PAGES) for pid, page in groups} <= wanted
    assert len(groups) == min(len(wanted), most) * AROUND_PAGES


def test_what_was_written_first_is_filled_first() -> None:
    written = [(1, range(70, 71)), (1, range(100, 101)), (1, range(3, 4)), (1, range(71, 72)), (2, range(65))]
    assert hot_groups(written) == {1: [(64, 64), (0, 32)], 2: [(0, 96)]}


class Task:
    """A restored task."""

    def __init__(self, work: Path, *mappings: tuple[int, int]) -> None:
        argv = [sys.executable, "-I", str(restored_task.__file__), str(work / "lazy-pages.socket")]
        argv += [f"{start}:{pages}" for start, pages in mappings]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    async def answer(self) -> str:
        assert self.process.stdout is not None
        return (await asyncio.to_thread(self.process.stdout.readline)).decode().strip()

    async def do(self, word: str, *numbers: int) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, (word, *numbers))).encode() + b"\n")
        self.process.stdin.flush()
        return await self.answer()

    async def read(self, address: int, count: int) -> list[int]:
        return [int(byte) for byte in (await self.do("read", address, count)).split()]


@pytest.fixture
async def memory() -> AsyncIterator[StoredMemory]:
    made = StoredMemory()
    yield made
    await made.close()
    await made.close()


@contextlib.contextmanager
def task(work: Path, *mappings: tuple[int, int]) -> Iterator[Task]:
    restored = Task(work, *mappings)
    try:
        yield restored
    finally:
        restored.process.kill()
        restored.process.communicate()


@contextlib.asynccontextmanager
async def restored(memory: StoredMemory, work: Path, *mappings: tuple[int, int]) -> AsyncIterator[Task]:
    """A task restored up to the hook, watched."""
    await memory.start(work)
    await memory.serve(work, None)
    with task(work, *mappings) as made:
        assert await made.answer() == "restored"
        await memory.watch(made.process.pid)
        yield made


def pages(start: int, *values: int, pid: int = PID) -> tuple[PageBatch, bytes]:
    """Consecutive pages, each full of one value."""
    content = b"".join(bytes([value]) * P for value in values)
    return PageBatch(pid=pid, starts=(start,), counts=(len(values),)), content


async def test_it_takes_pages_and_nothing_else(memory: StoredMemory) -> None:
    assert memory.take(*pages(P, 1, 2, 0, 4))
    assert memory.take(*pages(P, 1, pid=2))
    assert memory.content(PID, P, 4) == b"\1" * P + b"\2" * P + bytes(P) + b"\4" * P
    assert memory.take(DroppedPages(pid=PID, starts=(P,), counts=(2,)), b"")
    assert memory.content(PID, P, 4) == bytes(3 * P) + b"\4" * P
    assert memory.take(ProcessGone(pid=PID), b"")
    assert memory.content(PID, P, 4) == bytes(4 * P)
    assert not memory.take(Go(), b"")


async def test_a_host_without_memory_says_so(memory: StoredMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(NotEnoughSpace, match="after 0 pages: No space left"):
        memory.take(*pages(P, 1))


async def test_filled_in(memory: StoredMemory, tmp_path: Path) -> None:
    """What is touched before the end and after it is the store's; what it lacks is zero; the task runs on."""
    values = [1 + number % 250 for number in range(3000)]
    memory.take(*pages(BASE, *values))
    memory.take(*pages(FAR + 5 * P, 7, 8))
    memory.take(RoundEnd(n=1), b"")
    memory.take(*pages(BASE + 1000 * P, 9))
    values[1000] = 9
    async with restored(memory, tmp_path, (BASE, 3000), (FAR, 600)) as made:
        assert await made.read(FAR + 4 * P, 4) == [0, 7, 8, 0]
        assert await made.do("finish") == "finished"
        await memory.filled()
        assert await made.read(BASE, 3000) == values
        assert await made.read(FAR, 600) == [0] * 5 + [7, 8] + [0] * 593
        await memory.close()
        assert made.process.poll() is None


async def test_memory_that_is_given_back_stays_so(memory: StoredMemory, tmp_path: Path) -> None:
    memory.take(*pages(BASE, *[5] * 400))
    async with restored(memory, tmp_path, (BASE, 400)) as made:
        assert await made.do("drop", BASE + 10 * P, 20) == "0"
        assert await made.do("unmap", BASE + 100 * P, 10) == "0"
        assert await made.read(BASE + 9 * P, 22) == [5] + [0] * 20 + [5]
        await made.do("finish")
        await memory.filled()
        assert await made.read(BASE, 100) == [5] * 10 + [0] * 20 + [5] * 70


async def test_memory_that_moves_takes_its_content_along(memory: StoredMemory, tmp_path: Path) -> None:
    memory.take(*pages(BASE, *[1 + number % 100 for number in range(900)]))
    async with restored(memory, tmp_path, (BASE, 900)) as made:
        assert await made.do("move", BASE + 100 * P, FAR, 200, 1) == str(FAR)
        await made.do("finish")
        await memory.filled()
        assert await made.read(FAR, 200) == [1 + number % 100 for number in range(100, 300)]
        assert await made.read(BASE, 100) == [1 + number % 100 for number in range(100)]


async def test_memory_that_moves_while_it_is_filled_in_loses_no_page(memory: StoredMemory, tmp_path: Path) -> None:
    """Page by page, so that many a copy meets a mapping that goes away between its start and its end."""
    values = [1 + number % 100 for number in range(3000)]
    for number in reversed(range(len(values))):  # so that no two are neighbours in the store
        memory.take(*pages(BASE + number * P, values[number]))
    async with restored(memory, tmp_path, (BASE, len(values))) as made:
        await made.do("finish")
        assert await made.do("move", BASE, FAR, len(values), 400) == str(BASE)
        await memory.filled()
        assert await made.read(BASE, len(values)) == values
        assert "no place" not in (tmp_path / "filler.output").read_text()


async def test_a_child_has_what_its_parent_has(memory: StoredMemory, tmp_path: Path) -> None:
    values = [1 + number % 100 for number in range(900)]
    memory.take(*pages(BASE, *values))
    async with restored(memory, tmp_path, (BASE, 900)) as made:
        assert [int(byte) for byte in (await made.do("fork", BASE, 900)).split()] == values
        await made.do("finish")
        await memory.filled()
        assert await made.read(BASE, 900) == values


async def test_what_is_not_here_is_fetched(memory: StoredMemory, tmp_path: Path) -> None:
    """A fault does not wait for the background; pages that are here are not asked for."""
    asked: list[range] = []

    async def fetch(pid: int, address: int, count: int) -> bytes:
        assert pid == PID
        asked.append(range((address - BASE) // P, (address - BASE) // P + count))
        await asyncio.sleep(0)
        return b"\6" * P * count

    memory.take(*pages(BASE + 100 * P, *[5] * 50))
    (tmp_path / f"pagemap-{PID}.img").write_bytes(serialize(1, [Entry(BASE, 2000, LAZY)]))
    await memory.start(tmp_path)
    await memory.serve(tmp_path, fetch)
    with task(tmp_path, (BASE, 2100)) as made:
        assert await made.answer() == "restored"
        assert await made.read(BASE + 1999 * P, 2) == [6, 0]
        assert asked == [range(1999, 2000)]
        await memory.watch(made.process.pid)
        await made.do("finish")
        await memory.filled()
        assert await made.read(BASE, 2100) == [6] * 100 + [5] * 50 + [6] * 1850 + [0] * 100
    numbers = [number for part in asked for number in part]
    assert sorted(numbers) == [*range(100), *range(150, 2000)]


async def test_a_source_that_is_gone_is_the_end_of_the_tasks(memory: StoredMemory, tmp_path: Path) -> None:
    async def fetch(pid: int, address: int, count: int) -> bytes:
        raise ChannelFailed("the source is gone")

    (tmp_path / f"pagemap-{PID}.img").write_bytes(serialize(1, [Entry(BASE, 20, LAZY)]))
    await memory.start(tmp_path)
    await memory.serve(tmp_path, fetch)
    with task(tmp_path, (BASE, 20)) as made:
        await made.answer()
        await memory.watch(made.process.pid)
        await made.do("finish")
        with pytest.raises(MemoryLost, match="the source is gone"):
            await memory.filled()
        assert await asyncio.to_thread(made.process.wait, 20) == -9


@pytest.mark.parametrize("with_guard", [True, False])
async def test_a_filler_that_dies_is_the_end_of_the_tasks(
    memory: StoredMemory, tmp_path: Path, *, with_guard: bool
) -> None:
    """With a guard that was killed the agent does its work."""
    async with restored(memory, tmp_path, (BASE, 20)) as made:
        assert memory._filler is not None
        assert memory._guard is not None
        if not with_guard:
            os.kill(memory._filler.pid, signal.SIGSTOP)  # else the end of its tracer would let it go on and be reaped
            os.kill(memory._guard.pid, signal.SIGKILL)
        os.kill(memory._filler.pid, signal.SIGKILL)
        with pytest.raises(MemoryLost, match="killed by signal 9"):
            await memory.filled()
        assert await asyncio.to_thread(made.process.wait, 20) == -9


async def test_a_filler_that_has_died_before_it_is_watched_is_told(memory: StoredMemory, tmp_path: Path) -> None:
    """Else the tasks would be let run with zeroes where memory is missing."""
    await memory.start(tmp_path)
    await memory.serve(tmp_path, None)
    assert memory._filler is not None
    memory._filler.kill()
    await memory._filler.wait()
    held = await asyncio.create_subprocess_exec("sleep", "1000")
    with pytest.raises(RestoreFailed, match="guard of the memory"):
        await memory.watch(held.pid)
    held.kill()
    await held.wait()


async def test_closing_does_not_wait_for_a_restore_that_never_comes(memory: StoredMemory, tmp_path: Path) -> None:
    await memory.start(tmp_path)
    await memory.serve(tmp_path, None)
    await memory.close()


async def test_cancelled_while_the_filler_starts_it_is_ended_too(memory: StoredMemory, tmp_path: Path) -> None:
    starting = asyncio.ensure_future(memory.start(tmp_path))
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await memory.close()
    if memory._filler is not None:
        assert await memory._filler.wait() == -9
