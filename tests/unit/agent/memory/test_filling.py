"""The destination's side of memory: what it takes and answers, and how it ends; a script stands for CRIU's daemon."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coordinator.agent.memory.filling import LazyMemory
from coordinator.agent.memory.store import PAGE_BYTES
from coordinator.agent.messages import DroppedPages, Go, PageBatch, ProcessGone
from coordinator.errors import ChannelFailed, MemoryLost, NotEnoughSpace, RestoreFailed

P = PAGE_BYTES

#: Stands for `criu lazy-pages`: says that it is ready, and does what the test wants.
DAEMON = """#!/bin/sh
while [ $# -gt 0 ]; do
    [ "$1" = --status-fd ] && status=$2
    shift
done
{before}
printf x >/proc/self/fd/$status
{after}
"""


@pytest.fixture
async def memory() -> AsyncIterator[LazyMemory]:
    made = LazyMemory("4.2")
    yield made
    await made.close()
    await made.close()


def daemon(folder: Path, monkeypatch: pytest.MonkeyPatch, after: str, before: str = "") -> None:
    path = folder / "bin" / "criu"
    path.parent.mkdir()
    path.write_text(DAEMON.format(after=after, before=before))
    path.chmod(0o700)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


class Gate:
    """A FIFO that a script reads from; nobody waits for the other to open it."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self._descriptor = os.open(path, os.O_RDWR)

    def open(self) -> None:
        os.write(self._descriptor, b"end\n")


def task() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "1000"])


def pages(*numbers: int, pid: int = 1) -> tuple[PageBatch, bytes]:
    content = b"".join(bytes([number]) * P for number in numbers)
    return PageBatch(pid=pid, starts=tuple(n * P for n in numbers), counts=(1,) * len(numbers)), content


async def test_it_takes_pages_and_nothing_else(memory: LazyMemory) -> None:
    assert memory.take(*pages(1, 2, 4))
    assert memory.take(*pages(1, pid=2))
    assert memory._pages(1, P, 4) == b"\1" * P + b"\2" * P + bytes(P) + b"\4" * P
    assert memory.take(DroppedPages(pid=1, starts=(P,), counts=(2,)), b"")
    assert memory._pages(1, P, 4) == bytes(3 * P) + b"\4" * P
    assert memory.take(ProcessGone(pid=1), b"")
    assert memory.pages == 1
    assert memory.received_bytes == 4 * P
    assert not memory.take(Go(), b"")


async def test_what_is_not_here_is_fetched_in_its_place(memory: LazyMemory) -> None:
    asked = []

    async def fetch(pid: int, address: int, count: int) -> bytes:
        asked.append((pid, address // P, count))
        return b"f" * P * count

    memory.take(*pages(2, 5))
    memory._fetch = fetch
    content = await asyncio.to_thread(memory._pages, 1, P, 5)
    assert content == b"f" * P + b"\2" * P + b"f" * 2 * P + b"\5" * P
    assert asked == [(1, 1, 1), (1, 3, 2)]


async def test_a_fetch_that_fails_fails_the_answer(memory: LazyMemory) -> None:
    async def fetch(pid: int, address: int, count: int) -> bytes:
        raise ChannelFailed("the source is gone")

    memory._fetch = fetch
    with pytest.raises(ChannelFailed):
        await asyncio.to_thread(memory._pages, 1, 0, 1)


async def test_a_host_without_memory_says_so(memory: LazyMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(NotEnoughSpace, match="after 0 pages: No space left"):
        memory.take(*pages(1))


async def test_a_daemon_that_does_not_come_up(
    memory: LazyMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon(tmp_path, monkeypatch, "", before="exit 3")
    with pytest.raises(RestoreFailed, match="exit status 3"):
        await memory.start_daemon(tmp_path, tmp_path, None)


async def test_filled_in(memory: LazyMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard confirms that it watches; a daemon that ends well is the end of both, and the tasks run on."""
    gate = Gate(tmp_path / "gate")
    daemon(tmp_path, monkeypatch, f"read line <{tmp_path}/gate")
    with task() as restored:
        await memory.start_guard(tmp_path)
        await memory.start_daemon(tmp_path, tmp_path, None)
        await memory.watch(restored.pid)
        gate.open()
        await memory.filled()
        assert restored.poll() is None
        await memory.close()
        assert restored.poll() is None
        restored.kill()


async def test_a_daemon_that_dies_is_the_end_of_the_tasks(
    memory: LazyMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(tmp_path / "gate")
    daemon(tmp_path, monkeypatch, f"read line <{tmp_path}/gate; exit 4")
    with task() as restored:
        await memory.start_guard(tmp_path)
        await memory.start_daemon(tmp_path, tmp_path, None)
        await memory.watch(restored.pid)
        gate.open()
        with pytest.raises(MemoryLost, match="exit status 4"):
            await memory.filled()
        assert await asyncio.to_thread(restored.wait, 20) == -9


async def test_with_a_guard_that_was_killed_the_agent_does_its_task(
    memory: LazyMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(tmp_path / "gate")
    daemon(tmp_path, monkeypatch, f"read line <{tmp_path}/gate; exit 4")
    with task() as restored:
        pid = await memory.start_guard(tmp_path)
        await memory.start_daemon(tmp_path, tmp_path, None)
        await memory.watch(restored.pid)
        os.kill(pid, 9)
        gate.open()
        with pytest.raises(MemoryLost):
            await memory.filled()
        assert await asyncio.to_thread(restored.wait, 20) == -9


async def test_a_daemon_that_has_died_before_it_is_watched_is_told(
    memory: LazyMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tasks would be let run with zeroes where memory is missing."""
    daemon(tmp_path, monkeypatch, "exit 4")
    with task() as restored:
        await memory.start_guard(tmp_path)
        await memory.start_daemon(tmp_path, tmp_path, None)
        assert memory._daemon is not None
        await memory._daemon.wait()
        with pytest.raises(RestoreFailed, match="guard of the memory"):
            await memory.watch(restored.pid)
        restored.kill()


async def test_closing_does_not_wait_for_a_daemon_that_no_restore_has_met(
    memory: LazyMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restore that fails early never connects, and the daemon would wait for it for ever."""
    daemon(tmp_path, monkeypatch, "exec sleep 1000")
    await memory.start_guard(tmp_path)
    await memory.start_daemon(tmp_path, tmp_path, None)
    await memory.close()


async def test_cancelled_while_the_daemon_starts_it_is_ended_too(
    memory: LazyMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon(tmp_path, monkeypatch, "exec sleep 1000")
    starting = asyncio.ensure_future(memory.start_daemon(tmp_path, tmp_path, None))
    while memory._daemon is None:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await memory.close()
    assert await memory._daemon.wait() in (-9, -13)  # killed, or at its word that nobody hears any more
