"""Memory in memory: trackers and page reading on the source, the store, filler and guard on the destination.

Filler and guard are processes of their own, which outlive the agent: the filler dies when somebody has to bring pages
and nobody does, the guard kills the tasks it watches when the filler has failed (see ``memory/guard.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from coordinator.agent.fakes.workload import Page, is_lazy, mappings, runs
from coordinator.agent.fakes.world import AgentKilled, Life, Machine
from coordinator.agent.memory.base import NO_FILES, PAGE_BYTES, Changes, HeldFiles, PageRun, ProcessChanges
from coordinator.agent.memory.copying import MemorySource
from coordinator.agent.memory.filling import FETCH_TIMEOUT_S, Fetch
from coordinator.agent.memory.hidden_pages import HiddenPages
from coordinator.agent.memory.pages import PageData
from coordinator.agent.messages import ChannelMessage, DroppedPages, PageBatch, ProcessGone
from coordinator.errors import CommandFailed, MemoryLost, NotEnoughSpace, RestoreFailed, TrackingFailed
from coordinator.protocol import MemoryPolicy

#: A process's pid on the host, by its pid in CRIU's images.
OUTER_PID = 99
_ZEROES = bytes(PAGE_BYTES)
_BATCH_PAGES = 2


class FakeTrackers:
    """``Trackers`` that find what changed by comparing: exact, as the real ones have to be."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._machine = life.machine
        self._known: dict[Page, bytes] = {}
        self._pids: set[int] = set()
        self._gone: list[int] = []
        self._open = True
        life.step("tracking begins", TrackingFailed("this process forbids tracing"))
        self._machine.trackers += 1
        life.at_death.append(self._forget)  # the kernel closes the descriptors

    def collect(self, *, last: bool = False, files: HeldFiles = NO_FILES) -> dict[int, ProcessChanges]:
        """See ``Trackers``."""
        self._life.step("pages collected", TrackingFailed("a mapping cannot be registered"))
        if self._machine.copy == "absent":
            raise TrackingFailed("the root is gone")
        here = {page: data for page, data in self._machine.memory.items() if data != _ZEROES}
        pids = {pid for pid, _ in self._machine.memory}
        self._gone += sorted(self._pids - pids)
        answers = {}
        for pid in sorted(pids):
            fresh = pid not in self._pids
            before = {} if fresh else {page: data for page, data in self._known.items() if page[0] == pid}
            mine = {page: data for page, data in here.items() if page[0] == pid}
            changes = Changes(
                runs({page[1] for page, data in mine.items() if before.get(page) != data}),
                runs({page[1] for page in before.keys() - mine.keys()}),
                mappings(),
                len(mine),
            )
            answers[OUTER_PID + pid] = ProcessChanges(OUTER_PID + pid, pid, pid, fresh, changes)
        self._known, self._pids = here, pids
        self._life.world.work()
        return answers

    def take_gone(self) -> tuple[int, ...]:
        """See ``Trackers``."""
        gone, self._gone = tuple(self._gone), []
        return gone

    @property
    def at_freeze(self) -> None:
        """See ``Trackers``."""

    def close(self) -> None:
        """See ``Trackers``."""
        try:
            self._life.step("trackers closed", TrackingFailed("a process does not stop"))
        finally:
            self._forget()

    def _forget(self) -> None:
        if self._open:
            self._open = False
            self._machine.trackers -= 1


def fake_read(life: Life, pid: int, wanted: Iterable[PageRun]) -> Iterator[PageData]:
    """As ``pages.read_pages``, two pages at a time; the service goes on in between."""
    addresses = [run.start + number * PAGE_BYTES for run in wanted for number in range(run.pages)]
    for begin in range(0, len(addresses), _BATCH_PAGES):
        life.step("pages read", CommandFailed("reading pages fails"))
        group = addresses[begin : begin + _BATCH_PAGES]
        memory, inner = life.machine.memory, pid - OUTER_PID
        found = [address for address in group if (inner, address) in memory]
        data = b"".join(memory[inner, address] for address in found)
        here = tuple(PageRun(address, 1) for address in found)
        yield PageData(here, memoryview(data), tuple(PageRun(each, 1) for each in group if each not in found))
        life.world.work()


def fake_memory_source(life: Life, policy: MemoryPolicy, clock: Callable[[], float]) -> MemorySource:
    """The real ``MemorySource`` over the world's memory."""
    machine = life.machine

    def processes(_: int) -> dict[int, int]:
        return {pid: OUTER_PID + pid for pid in sorted({pid for pid, _ in machine.memory})}

    def started(pid: int) -> int | None:
        return 1 if machine.copy in ("running", "frozen") else None

    def hide(root_pid: int, _: object) -> HiddenPages:
        return HiddenPages(
            root_pid, processes=lambda root: processes(root).values(), mappings=lambda _: list(mappings())
        )

    return MemorySource(
        policy,
        lambda _: FakeTrackers(life),
        clock=clock,
        read=partial(fake_read, life),
        processes=processes,
        started=started,
        hide=hide,
    )


class _Guard:
    """The guard's process: ends when the agent says so, or, without an agent, when the filler does."""

    def __init__(self, life: Life) -> None:
        self.machine, self._world = life.machine, life.world
        self._end: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._orphaned = False
        self.watching: _Filler | None = None
        self.exit = life.world.spawn(life.machine, self._run())
        life.at_death.append(self._agent_died)

    def close(self, *, done: bool) -> None:
        """The agent says ``done``, or ``end``."""
        if not self._end.done():
            self._end.set_result(done)

    def _agent_died(self) -> None:
        self._orphaned = self.watching is not None and self.watching.alone
        self.close(done=False)

    async def _run(self) -> int:
        done = await self._end
        if self._orphaned and self.watching is not None:
            done = await asyncio.shield(self.watching.exit) == 0
        self.machine.keepers.discard("guard")
        if done or not self.watching:
            return 0
        if self.machine.copy in ("held", "running"):
            self._world.killed = True
            self._world.set_copy(self.machine, "absent")
        return 1


class _Filler:
    """The filler: brings missing pages in, one by one, until there are none. Dies if the agent has to answer and does
    not."""

    def __init__(self, life: Life, answer: Callable[[Page], asyncio.Future[bytes]]) -> None:
        self._world, self._machine = life.world, life.machine
        self._answer = answer
        self._connected, self._hung_up = asyncio.Event(), asyncio.Event()
        self._machine.daemon = self.fault
        self._dead = False
        #: Whether it needs the agent no more.
        self.alone = False
        self.exit = life.world.spawn(life.machine, self._run())
        life.at_death.append(lambda: None if self.alone else self.hang_up())

    def hang_up(self) -> None:
        """Nobody is at the other end of the socket."""
        self._hung_up.set()

    async def fault(self, page: Page) -> bool:
        """A restored task touches a page: whether it got it."""
        self._connected.set()
        asked = self._answer(page)
        hung_up = asyncio.ensure_future(self._hung_up.wait())
        await asyncio.wait((asked, hung_up), return_when=asyncio.FIRST_COMPLETED, timeout=FETCH_TIMEOUT_S)
        hung_up.cancel()
        failed = not asked.done() or asked.cancelled() or asked.exception() is not None or self._hung_up.is_set()
        if failed or self._dead:
            asked.cancel()
            self._die()
            return False
        if page in self._machine.missing:
            self._machine.memory[page] = asked.result()
            self._machine.missing.discard(page)
        return True

    def _die(self) -> None:
        self._dead = True
        self._hung_up.set()
        self._machine.keepers.discard("daemon")
        self._machine.daemon = None

    async def _run(self) -> int:
        """Wait for the tasks; when they run, fill in the rest behind their back."""
        while self._machine.copy != "running":
            if self._hung_up.is_set() or (self._connected.is_set() and self._machine.copy == "absent"):
                self._die()
                return 1
            await asyncio.sleep(0.01)
        while self._machine.missing:
            await asyncio.sleep(0.01)
            if not await self.fault(min(self._machine.missing or {(0, 0)})):
                return 1
            self._world.changed(f"{self._machine.name}: a page is filled in")
        self._die()
        return 0


class FakeFilling:
    """A ``FillingMemory`` in memory."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._machine: Machine = life.machine
        self._store: dict[Page, bytes] = {}
        self._fetch: Fetch | None = None
        self._guard: _Guard | None = None
        self._filler: _Filler | None = None

    def take(self, message: ChannelMessage, payload: bytes) -> bool:
        """See ``FillingMemory``."""
        if not isinstance(message, PageBatch | DroppedPages | ProcessGone):
            return False
        self._life.step(f"{type(message).__name__} taken", NotEnoughSpace("no memory"))
        if isinstance(message, ProcessGone):
            self._store = {page: data for page, data in self._store.items() if page[0] != message.pid}
            return True
        pages = [
            (message.pid, start + number * PAGE_BYTES)
            for start, count in zip(message.starts, message.counts, strict=True)
            for number in range(count)
        ]
        for number, page in enumerate(pages):
            if isinstance(message, PageBatch):
                if not is_lazy(page):
                    self._life.world.broken.append(f"page {page} is sent, which is in the images")
                self._store[page] = payload[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]
            else:
                self._store.pop(page, None)
        return True

    def content(self, pid: int, address: int, count: int) -> bytes:
        """See ``FillingMemory``."""
        return b"".join(self._store[pid, address + number * PAGE_BYTES] for number in range(count))

    @property
    def external(self) -> tuple[str, ...]:
        """See ``FillingMemory``."""
        return ()

    async def start(self, work: Path) -> int:
        """See ``FillingMemory``."""
        await self._life.verb("guard starts", CommandFailed("the guard does not start"))
        self._guard = _Guard(self._life)
        await self._life.checkpoint()
        return next(pid for pid, task in self._machine.helpers.items() if task is self._guard.exit)

    async def serve(self, images: Path, fetch: Fetch | None) -> None:
        """See ``FillingMemory``."""
        await self._life.verb("daemon starts", RestoreFailed("the daemon does not come up"))
        self._fetch = fetch
        self._filler = _Filler(self._life, self._answer)
        await self._life.checkpoint()

    async def watch(self, root_pid: int) -> tuple[str, ...]:
        """See ``FillingMemory``."""
        assert self._guard is not None
        assert self._filler is not None
        self._guard.watching = self._filler
        self._filler.alone = self._fetch is None
        await self._life.verb("guard watches", RestoreFailed("the guard does not watch"))
        if "daemon" not in self._machine.keepers:
            raise RestoreFailed("the daemon has ended")
        self._machine.keepers.add("guard")
        await self._life.checkpoint()
        return ()

    async def filled(self) -> None:
        """See ``FillingMemory``."""
        assert self._filler is not None
        await self._life.checkpoint()
        if await asyncio.shield(self._filler.exit) != 0:
            await self._dismiss_guard(done=False)
            raise MemoryLost("the service was killed, its memory could not be filled in")
        await self._life.checkpoint()
        await self._dismiss_guard(done=True)

    async def close(self) -> None:
        """See ``FillingMemory``."""
        await self._dismiss_guard(done=False)
        if self._filler is not None:
            self._filler.hang_up()
            await asyncio.shield(self._filler.exit)
        self._store.clear()

    async def _dismiss_guard(self, *, done: bool) -> None:
        if self._guard is not None:
            self._guard.close(done=done)
            await asyncio.shield(self._guard.exit)
        await self._life.checkpoint()

    def _answer(self, page: Page) -> asyncio.Future[bytes]:
        """What the agent answers to the filler."""
        return asyncio.ensure_future(self._page(page))

    async def _page(self, page: Page) -> bytes:
        if page in self._store or self._fetch is None:
            return self._store.get(page, _ZEROES)
        try:
            return await self._fetch(page[0], page[1], 1)
        except AgentKilled as killed:
            raise MemoryLost("nobody brings pages") from killed
