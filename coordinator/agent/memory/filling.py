"""The destination's side of memory: takes pages as they come, and fills them into the restored tasks behind the freeze.

Tasks are restored without their memory and run at once. CRIU's ``lazy-pages`` daemon holds their userfaultfds; it asks
our page server for what a task touches, and for the rest in the background. Until it has ended, the memory of the
service is partly here in the store, and with ``fetch`` partly still in the frozen tasks on the source.

What a death means meanwhile: of the SSH session or the coordinator, nothing. Of the daemon or this agent: the guard
(``guard.py``) kills the service rather than let it run with zeroes where memory is missing (docs/operations.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from coordinator.agent.memory import guard
from coordinator.agent.memory.page_server import Layout, PageServer
from coordinator.agent.memory.prefetch import prefetch, processes
from coordinator.agent.memory.store import PAGE_BYTES, PageStore
from coordinator.agent.messages import ChannelMessage, DroppedPages, PageBatch, ProcessGone, RoundEnd
from coordinator.agent.process import Command, Running, describe_failure, first_explaining_line, start
from coordinator.errors import MemoryLost, NotEnoughSpace, RestoreFailed

#: (pid, address, pages) → content, asked of the frozen source.
Fetch = Callable[[int, int, int], Awaitable[bytes]]

FETCH_TIMEOUT_S, GUARD_TIMEOUT_S = 30.0, 10.0

#: At most so many pages go into the images: 16 MiB take about 10 ms of the freeze, and save a wait of 0.1 ms each.
PREFETCH_PAGES = 4096


class FillingMemory(Protocol):
    """The memory of one migration on the destination."""

    def take(self, message: ChannelMessage, payload: bytes) -> bool:
        """Take a message of the copying source; ``False`` if it is not about memory.

        Raises ``NotEnoughSpace`` if this host's memory does not hold the pages."""

    def content(self, pid: int, address: int, count: int) -> bytes:
        """Pages that were taken."""

    async def start_guard(self, work: Path) -> int:
        """Start the guard, long before it is needed: its start takes longer than a freeze should. Returns its pid."""

    async def start_daemon(self, images: Path, work: Path, fetch: Fetch | None) -> None:
        """Start CRIU's daemon on complete images, and return when it waits for the restore. About 8 ms.

        ``fetch`` gets the pages that were never sent; without it they are zero. Raises ``RestoreFailed`` if the daemon
        does not come up."""

    async def watch(self, root_pid: int) -> None:
        """Tell the guard whom to kill if the filling does not come to its end. The tasks are restored and held.

        Raises ``RestoreFailed`` if the guard does not confirm it: then nothing would stand between the tasks and zeroes
        where memory is missing."""

    async def filled(self) -> None:
        """Return when every page is in the tasks; raise ``MemoryLost`` if that cannot be reached any more."""

    async def close(self) -> None:
        """Give the store's memory back, and end daemon and guard: tasks not filled in by now are killed. Idempotent."""


class LazyMemory:
    """The real ``FillingMemory``."""

    def __init__(self, criu_version: str) -> None:
        self._store = PageStore()
        self._fetch: Fetch | None = None
        self._loop = asyncio.get_running_loop()
        self._server = PageServer(Layout.of_version(criu_version), self._pages)
        self._daemon: Running | None = None
        self._guard: Running | None = None
        self._to_guard: socket.socket | None = None
        self._work = Path()
        self._root_pid = 0
        self._recent: list[tuple[int, range]] = []
        self._before: list[tuple[int, range]] = []
        self.received_bytes = 0

    @property
    def pages(self) -> int:
        """How many pages the store holds."""
        return self._store.pages

    def take(self, message: ChannelMessage, payload: bytes) -> bool:
        """See ``FillingMemory``."""
        try:
            if isinstance(message, PageBatch):
                self._put(message, payload)
            elif isinstance(message, DroppedPages):
                for address, count in zip(message.starts, message.counts, strict=True):
                    self._store.drop(message.pid, address, count)
            elif isinstance(message, ProcessGone):
                self._store.drop_process(message.pid)
            elif isinstance(message, RoundEnd):
                # The first round is all memory, in the order of addresses: it says nothing of what is hot.
                self._before = self._recent if message.n > 1 else []
                self._recent = []
            else:
                return False
        except OSError as error:
            raise NotEnoughSpace(f"storing a page after {self._store.pages} pages: {error.strerror}") from error
        return True

    def _put(self, message: PageBatch, payload: bytes) -> None:
        view = memoryview(payload)
        for address, count in zip(message.starts, message.counts, strict=True):
            self._store.put(message.pid, address, view[: count * PAGE_BYTES])
            view = view[count * PAGE_BYTES :]
            if message.pid > 0:  # else it is shared memory, which no daemon fills in
                self._recent.append((message.pid, range(address // PAGE_BYTES, address // PAGE_BYTES + count)))
        self.received_bytes += len(payload)

    def content(self, pid: int, address: int, count: int) -> bytes:
        """See ``FillingMemory``."""
        return self._store.read(pid, address, count)

    async def start_guard(self, work: Path) -> int:
        """See ``FillingMemory``."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._to_guard = ours
        with theirs:
            program = (sys.executable, "-I", "-S", str(Path(guard.__file__).resolve()), str(theirs.fileno()))
            self._guard = await start(Command(program, {}), work / "guard.output", inherit=(theirs.fileno(),))
        return self._guard.pid

    async def watch(self, root_pid: int) -> None:
        """See ``FillingMemory``."""
        assert self._daemon is not None
        assert self._to_guard is not None
        self._root_pid = root_pid
        try:
            async with asyncio.timeout(GUARD_TIMEOUT_S):
                await self._loop.sock_sendall(self._to_guard, f"watch {self._daemon.pid} {root_pid}\n".encode())
                answer = await self._loop.sock_recv(self._to_guard, 64)
        except (OSError, TimeoutError) as error:
            raise RestoreFailed(f"the guard of the memory does not answer: {error!r}") from error
        if not answer.startswith(b"watching"):
            raise RestoreFailed(f"the guard of the memory ended; CRIU's daemon: {self._log()}")

    async def start_daemon(self, images: Path, work: Path, fetch: Fetch | None) -> None:
        """See ``FillingMemory``."""
        self._work = work
        self._fetch = fetch
        await asyncio.to_thread(self._prefetch, images)
        reading, writing = os.pipe2(os.O_CLOEXEC)
        theirs = self._server.daemon_socket
        options = ("--images-dir", str(images), "--work-dir", str(work), "--log-file", "lazy-pages.log", "-v1")
        pages = ("--page-server", "--ps-socket", str(theirs), "--status-fd", str(writing))
        try:
            command = Command(("criu", "lazy-pages", *options, *pages), {})
            starting = asyncio.ensure_future(start(command, work / "lazy-pages.output", inherit=(theirs, writing)))
            try:
                self._daemon = await asyncio.shield(starting)
            except asyncio.CancelledError:  # it runs all the same, and ``close`` must know of it
                self._daemon = await starting
                raise
        finally:
            os.close(writing)
        self._server.start()
        try:
            ready = await asyncio.to_thread(os.read, reading, 1)
        finally:
            os.close(reading)
        if not ready:
            raise RestoreFailed(await self._why_it_ended())

    async def filled(self) -> None:
        """See ``FillingMemory``."""
        assert self._daemon is not None
        with contextlib.suppress(OSError):  # it was started in the hurry of the freeze; now the service goes first
            os.setpriority(os.PRIO_PROCESS, self._daemon.pid, 0)
        status = await self._daemon.wait()
        failure = await asyncio.to_thread(self._server.close)
        if status != 0 or failure is not None:
            why = f"{type(failure).__name__}: {failure}" if failure is not None else await self._why_it_ended()
            if await self._dismiss_guard() < 0 and self._root_pid:  # somebody has killed it: its task is ours
                guard.kill(guard.tree(self._root_pid))
            raise MemoryLost(f"the service was killed, its memory could not be filled in: {why}")
        if self._to_guard is not None:
            with contextlib.suppress(OSError):  # a guard that has died is needed no more
                await self._loop.sock_sendall(self._to_guard, b"done\n")
        await self._dismiss_guard()

    async def _dismiss_guard(self) -> int:
        """Its exit status. Without ``done`` before, this makes the guard kill the tasks it watches."""
        if self._to_guard is not None:
            self._to_guard.close()
            self._to_guard = None
        return await self._guard.wait() if self._guard is not None else 0

    async def close(self) -> None:
        """See ``FillingMemory``."""
        await self._dismiss_guard()
        await asyncio.to_thread(self._server.close)
        if self._daemon is not None:
            self._daemon.kill()  # with no restore that has connected it would wait for one for ever
            await self._daemon.wait()
        self._store.close()

    def _prefetch(self, images: Path) -> None:
        """Move into the images what was written last, that of the frozen tasks first, and the smallest pieces."""
        hot: dict[int, list[range]] = {pid: [] for pid in processes(images)}
        left = PREFETCH_PAGES
        for pid, numbers in (*self._recent, *self._before):
            if left > 0 and pid in hot:
                hot[pid] += self._held(pid, numbers[:left])
                left -= len(numbers[:left])
        for pid, ranges in hot.items():
            pages = sum(map(len, ranges)) + left // len(hot)
            prefetch(images, pid, ranges, self._store.read, held=self._held, pages=pages)

    def _held(self, pid: int, numbers: range) -> list[range]:
        """The pages that the store has: others were dropped since, or are to be fetched."""
        spans = self._spans(pid, numbers.start * PAGE_BYTES, len(numbers))
        return [range(address // PAGE_BYTES, address // PAGE_BYTES + count) for address, count, here in spans if here]

    async def _why_it_ended(self) -> str:
        assert self._daemon is not None
        return describe_failure(self._daemon.command, await self._daemon.wait(), self._log())

    def _log(self) -> str:
        log = self._work / "lazy-pages.log"
        return first_explaining_line(log.read_text(errors="replace") if log.exists() else "")

    def _pages(self, pid: int, address: int, count: int) -> bytes:
        """What the page server's thread answers: the store's pages, and the source's for those it lacks."""
        if self._fetch is None:
            return self._store.read(pid, address, count)
        parts = []
        for start_at, length, here in self._spans(pid, address, count):
            if here:
                parts.append(self._store.read(pid, start_at, length))
            else:
                asked = asyncio.run_coroutine_threadsafe(_awaited(self._fetch, pid, start_at, length), self._loop)
                parts.append(asked.result(FETCH_TIMEOUT_S))
        return b"".join(parts)

    def _spans(self, pid: int, address: int, count: int) -> list[tuple[int, int, bool]]:
        spans: list[tuple[int, int, bool]] = []
        for number in range(count):
            at = address + number * PAGE_BYTES
            here = self._store.holds(pid, at)
            if spans and spans[-1][2] == here:
                spans[-1] = (spans[-1][0], spans[-1][1] + 1, here)
            else:
                spans.append((at, 1, here))
        return spans


async def _awaited(fetch: Fetch, pid: int, address: int, count: int) -> bytes:
    return await fetch(pid, address, count)
