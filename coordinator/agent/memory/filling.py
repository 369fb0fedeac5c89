"""The destination's side of memory: takes pages as they come, and has them filled into the restored tasks behind the
freeze.

Tasks are restored without their memory and run at once. The filler (``filler.py``), a process of its own, puts the
pages of the store into them: what a task touches, and the rest in the background. Until it has ended, the memory of the
service is partly here in the store, and with ``fetch`` partly still in the frozen tasks on the source.

What a death means meanwhile: of the SSH session or the coordinator, nothing; of this agent nothing either, unless pages
are still on the source. Of the filler, or of the agent while it fetches: the guard (``guard.py``) kills the service
rather than let it run with zeroes where memory is missing (docs/operations.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from coordinator.agent.memory import filler, guard
from coordinator.agent.memory.pagemap_images import lazy_pages
from coordinator.agent.memory.store import PAGE_BYTES, PageStore
from coordinator.agent.memory.taking_over import ReceivedObjects
from coordinator.agent.memory.tmpfs_target import ReceivedTmpfs
from coordinator.agent.messages import (
    ChannelMessage,
    DroppedPages,
    HandedOver,
    PageBatch,
    ProcessGone,
    RoundEnd,
    SharedObject,
    TmpfsEntries,
    TmpfsFile,
    TmpfsFileGone,
    TmpfsMount,
)
from coordinator.agent.process import Command, Running, describe_failure, first_explaining_line, start
from coordinator.errors import MemoryLost, NotEnoughSpace, RestoreFailed

#: (pid, address, pages) → content, asked of the frozen source.
Fetch = Callable[[int, int, int], Awaitable[bytes]]

FETCH_TIMEOUT_S, GUARD_TIMEOUT_S = 30.0, 10.0

#: At most so many groups of pages are filled in before all others, in the order they were written in, the last first.
#: One costs some 30 µs and 0.5 for each page, and saves a task that touches any of them a fault.
HOT_GROUPS = 1024

#: Where CRIU's restore looks for who fills in, in its working directory (criu/uffd.c, LAZY_PAGES_SOCK_NAME).
_SOCKET = "lazy-pages.socket"
_ROOT = Path(__file__).resolve().parents[3]
_PROGRAM = "import sys; sys.path.insert(0, sys.argv.pop(1)); from {module} import main; sys.exit(main())"


def _program(module: str, *descriptors: int) -> Command:
    """A module of the agent's as a program, which starts with as little of Python as it needs."""
    code = _PROGRAM.format(module=module)
    return Command((sys.executable, "-I", "-S", "-c", code, str(_ROOT), *map(str, descriptors)), {})


def hot_groups(written: Iterable[tuple[int, range]], most: int = HOT_GROUPS) -> dict[int, list[tuple[int, int]]]:
    """For each process (page, count) of the groups that have pages of these, in their order (pure): each group once,
    and neighbours as one. A group is what a fault brings along (``filler.AROUND_PAGES``)."""
    around = filler.AROUND_PAGES
    groups = (
        (pid, group) for pid, pages in written for group in range(pages.start // around, -(-pages.stop // around))
    )
    found: dict[int, list[tuple[int, int]]] = {}
    for pid, group in islice(dict.fromkeys(groups), most):
        first, runs = group * around, found.setdefault(pid, [])
        if runs and sum(runs[-1]) == first:
            first, _ = runs.pop()
        runs.append((first, (group + 1) * around - first))
    return found


class FillingMemory(Protocol):
    """The memory of one migration on the destination."""

    def take(self, message: ChannelMessage, payload: bytes) -> bool:
        """Take a message of the copying source; ``False`` if it is not about memory.

        Raises ``NotEnoughSpace`` if this host's memory does not hold the pages."""

    def content(self, pid: int, address: int, count: int) -> bytes:
        """Pages that were taken."""

    @property
    def external(self) -> tuple[str, ...]:
        """What CRIU gets from us (criu(8), --external)."""

    async def start(self, work: Path) -> int:
        """Start filler and guard, long before they are needed: their start takes longer than a freeze should.

        ``work`` is CRIU's working directory. Returns the guard's pid."""

    async def serve(self, images: Path, fetch: Fetch | None) -> None:
        """The images are complete: fill in whatever a restore of them registers.

        ``fetch`` gets the pages that were never sent; without it they are zero."""

    async def watch(self, root_pid: int) -> tuple[str, ...]:
        """The tasks are restored and held: tell the guard whom to kill if the filling does not come to its end, and
        fill in what they will touch first. See that their shared memory is all there; returns what is to be said of it.

        Raises ``RestoreFailed`` if the guard does not confirm it: then nothing would stand between the tasks and zeroes
        where memory is missing."""

    async def filled(self) -> None:
        """Return when every page is in the tasks; raise ``MemoryLost`` if that cannot be reached any more."""

    async def close(self) -> None:
        """Give the store's memory back, and end filler and guard: tasks not filled in by now are killed. Idempotent."""


class StoredMemory:
    """The real ``FillingMemory``."""

    def __init__(self) -> None:
        self._store = PageStore()
        self._objects = ReceivedObjects()
        self._tmpfs = ReceivedTmpfs(self._objects.descriptor)
        self._fetch: Fetch | None = None
        self._filler: Running | None = None
        self._guard: Running | None = None
        self._to_filler: asyncio.StreamWriter | None = None
        self._to_guard: socket.socket | None = None
        self._answering: asyncio.Task[None] | None = None
        self._fetching: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._work = Path()
        self._root_pid = 0
        self._recent: list[tuple[int, range]] = []
        self._before: list[tuple[int, range]] = []

    def take(self, message: ChannelMessage, payload: bytes) -> bool:
        """See ``FillingMemory``."""
        try:
            if isinstance(message, PageBatch):
                self._put(message, payload)
            elif isinstance(message, DroppedPages):
                drop = self._store.drop if message.pid > 0 else self._objects.drop
                for address, count in zip(message.starts, message.counts, strict=True):
                    drop(message.pid, address, count)
            elif isinstance(message, SharedObject):
                self._objects.make(message.number, message.name, sealable=message.sealable)
            elif isinstance(message, HandedOver):
                self._objects.complete(message)
            elif isinstance(message, ProcessGone):
                self._store.drop_process(message.pid)
            elif isinstance(message, RoundEnd):
                # The first round is all memory, in the order of addresses: it says nothing of what is hot.
                self._before = self._recent if message.n > 1 else []
                self._recent = []
            else:
                return self._take_of_tmpfs(message, payload)
        except OSError as error:
            raise NotEnoughSpace(f"storing a page after {self._store.pages} pages: {error.strerror}") from error
        return True

    def _take_of_tmpfs(self, message: ChannelMessage, payload: bytes) -> bool:
        if isinstance(message, TmpfsMount):
            self._tmpfs.make(self._work, message)
        elif isinstance(message, TmpfsFile):
            self._objects.keep(message.number, self._tmpfs.file(message.mount))
        elif isinstance(message, TmpfsFileGone):
            self._objects.forget(message.number)
        elif isinstance(message, TmpfsEntries):
            self._tmpfs.put(message, payload)
        else:
            return False
        return True

    @property
    def external(self) -> tuple[str, ...]:
        """See ``FillingMemory``."""
        return self._tmpfs.external

    def _put(self, message: PageBatch, payload: bytes) -> None:
        view = memoryview(payload)
        for address, count in zip(message.starts, message.counts, strict=True):
            data, view = view[: count * PAGE_BYTES], view[count * PAGE_BYTES :]
            if message.pid < 0:
                self._objects.put(message.pid, address, data)
                continue
            self._store.put(message.pid, address, data)
            self._recent.append((message.pid, range(address // PAGE_BYTES, address // PAGE_BYTES + count)))

    def content(self, pid: int, address: int, count: int) -> bytes:
        """See ``FillingMemory``."""
        return self._store.read(pid, address, count) if pid > 0 else self._objects.read(pid, address, count)

    async def start(self, work: Path) -> int:
        """See ``FillingMemory``."""
        self._work = work
        await self._start_filler()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._to_guard = ours
        with theirs:
            program = _program(guard.__name__, theirs.fileno())
            self._guard = await start(program, work / "guard.output", inherit=(theirs.fileno(),))
        return self._guard.pid

    async def _start_filler(self) -> None:
        ours, theirs = socket.socketpair()
        listener = socket.socket(socket.AF_UNIX)
        with theirs, listener:
            self._listen(listener)
            inherited = (theirs.fileno(), listener.fileno(), self._store.pages_file, self._store.index_file)
            reader, self._to_filler = await asyncio.open_unix_connection(sock=ours)
            program = _program(filler.__name__, *inherited)
            starting = asyncio.ensure_future(start(program, self._work / "filler.output", inherit=inherited))
            try:
                self._filler = await asyncio.shield(starting)
            except asyncio.CancelledError:  # it runs all the same, and ``close`` must know of it
                self._filler = await starting
                raise
        self._answering = asyncio.create_task(self._answer(reader))

    def _listen(self, listener: socket.socket) -> None:
        """By way of the folder's descriptor: the name of a socket has at most 107 bytes (unix(7))."""
        folder = os.open(self._work, os.O_PATH | os.O_CLOEXEC)
        try:
            listener.bind(f"/proc/self/fd/{folder}/{_SOCKET}")
        finally:
            os.close(folder)
        listener.listen()

    async def serve(self, images: Path, fetch: Fetch | None) -> None:
        """See ``FillingMemory``."""
        self._objects.arm(images)
        self._fetch = fetch
        later = 0
        if fetch is not None:
            for pid, runs in (await asyncio.to_thread(lazy_pages, images)).items():
                for run in runs:
                    self._store.expect(pid, run.start, run.pages)
                    later += run.pages
        directory = [(pid, list(blocks.items())) for pid, blocks in self._store.directory().items()]
        hot = hot_groups((*self._recent, *self._before))
        slots = self._store.reserve(later)
        await self._tell(directory=directory, hot=list(hot.items()), slots=slots, complete=fetch is None)

    async def _tell(self, **message: Any) -> None:
        """Say something to the filler. One that is gone is missed by ``filled``."""
        assert self._to_filler is not None
        data = json.dumps(message).encode()
        self._to_filler.write(filler.LENGTH.pack(len(data)) + data)
        with contextlib.suppress(OSError):
            await self._to_filler.drain()

    async def _answer(self, reader: asyncio.StreamReader) -> None:
        """Take the filler's wishes for pages until it ends."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                (length,) = filler.LENGTH.unpack(await reader.readexactly(filler.LENGTH.size))
                wanted = json.loads(await reader.readexactly(length))["want"]
                task = asyncio.create_task(self._bring(*wanted))
                self._fetching.add(task)
                task.add_done_callback(self._fetching.discard)

    async def _bring(self, pid: int, first: int, count: int) -> None:
        """Fetch pages from the source into the store. If that fails, the filler is ended: its task can't be done."""
        try:
            assert self._fetch is not None
            async with asyncio.timeout(FETCH_TIMEOUT_S):
                content = await self._fetch(pid, first * PAGE_BYTES, count)
            self._store.put(pid, first * PAGE_BYTES, content)
            await self._tell(here=(pid, first, count))
        except Exception as error:
            self._failure = self._failure or error
            if self._filler is not None:
                self._filler.kill()

    async def watch(self, root_pid: int) -> tuple[str, ...]:
        """See ``FillingMemory``."""
        assert self._filler is not None
        assert self._to_guard is not None
        self._root_pid = root_pid
        self._tmpfs.check(root_pid)
        remarks = await asyncio.to_thread(self._objects.check, root_pid)
        self._tmpfs.close()
        await self._tell(begin=True)
        loop = asyncio.get_running_loop()
        needs_agent = int(self._fetch is not None)
        try:
            async with asyncio.timeout(GUARD_TIMEOUT_S):
                await loop.sock_sendall(self._to_guard, f"watch {self._filler.pid} {root_pid} {needs_agent}\n".encode())
                answer = await loop.sock_recv(self._to_guard, 64)
        except (OSError, TimeoutError) as error:
            raise RestoreFailed(f"the guard of the memory does not answer: {error!r}") from error
        if not answer.startswith(b"watching"):
            raise RestoreFailed(f"the guard of the memory ended; the filler: {self._log()}")
        return remarks

    async def filled(self) -> None:
        """See ``FillingMemory``."""
        assert self._filler is not None
        status = await self._filler.wait()
        if status != 0:
            why = f"{type(self._failure).__name__}: {self._failure}" if self._failure else await self._why_it_ended()
            if await self._dismiss_guard() < 0 and self._root_pid:  # somebody has killed it: its task is ours
                guard.kill(guard.tree(self._root_pid))
            raise MemoryLost(f"the service was killed, its memory could not be filled in: {why}")
        if self._to_guard is not None:
            with contextlib.suppress(OSError):  # a guard that has died is needed no more
                await asyncio.get_running_loop().sock_sendall(self._to_guard, b"done\n")
        await self._dismiss_guard()

    async def _dismiss_guard(self) -> int:
        """Its exit status. Without ``done`` before, it kills the tasks it watches."""
        if self._to_guard is not None:
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().sock_sendall(self._to_guard, b"end\n")
            self._to_guard.close()
            self._to_guard = None
        return await self._guard.wait() if self._guard is not None else 0

    async def close(self) -> None:
        """See ``FillingMemory``."""
        await self._dismiss_guard()
        if self._filler is not None:
            self._filler.kill()
            await self._filler.wait()
        if self._to_filler is not None:
            self._to_filler.close()
        for task in (*self._fetching, *((self._answering,) if self._answering is not None else ())):
            task.cancel()
            await asyncio.wait((task,))
        self._objects.close()
        self._tmpfs.close()
        self._store.close()

    async def _why_it_ended(self) -> str:
        assert self._filler is not None
        return describe_failure(self._filler.command, await self._filler.wait(), self._log())

    def _log(self) -> str:
        log = self._work / "filler.output"
        return first_explaining_line(log.read_text(errors="replace") if log.exists() else "")
