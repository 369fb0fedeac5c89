"""CRIU in memory, held at its hooks: what the real one does to the tasks, deciding by the same journal file.

A dump or restore is a task that belongs to no agent. It stands at a hook until the agent lets it go or is dead, and
then reads the journal as the script in ``agent/criu.py`` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from coordinator.agent.criu import Dump, Restore, Started
from coordinator.agent.fakes.images import FakeImageHold
from coordinator.agent.fakes.memory import OUTER_PID
from coordinator.agent.fakes.workload import Page, is_lazy
from coordinator.agent.fakes.world import Life, Machine, World, decision
from coordinator.agent.hook import POST_DUMP, POST_RESTORE, PRE_DUMP
from coordinator.agent.images import INVENTORY, ImageHold
from coordinator.agent.memory.base import PAGE_BYTES
from coordinator.agent.memory.hidden_pages import HiddenPages
from coordinator.agent.process import Command
from coordinator.errors import DumpFailed, LivemoveError, RestoreFailed

_PAGES, _MAP, _TREE, _EMPTY = "pages-1.img", "pagemap-1.img", "pstree.img", "fs-1.img"
_POLL_S = 0.1


class FakeCriuRun:
    """One CRIU process on a machine."""

    def __init__(self, world: World, machine: Machine, journal: Path, actions: tuple[str, ...]) -> None:
        self.world = world
        self.machine = machine
        self.journal = journal
        self.proceed = False
        self.connected = asyncio.Event()
        self.resumed = asyncio.Event()
        self.reached = {action: asyncio.Event() for action in actions}
        self._unlocked = {action: asyncio.Event() for action in actions}
        self.pid = next(world.pids)

    def begin(self, work: Coroutine[Any, Any, int]) -> asyncio.Task[int]:
        """Become a process."""
        task = asyncio.create_task(work)
        self.machine.commands[self.pid] = task
        task.add_done_callback(lambda _: self.machine.commands.pop(self.pid))
        return task

    def unlock(self, action: str) -> None:
        """Drop the lock that the hook waits for."""
        self._unlocked[action].set()

    def unlock_all(self) -> None:
        """Drop all locks, as the kernel does when the agent ends."""
        for action in self._unlocked:
            self.unlock(action)

    async def _stand(self, action: str) -> None:
        self.reached[action].set()
        await self._unlocked[action].wait()

    async def dump(self, *, lazy: bool, hidden: HiddenPages | None, at_freeze: Callable[[], None] | None) -> int:
        """A dump, with its exit status. A lazy one leaves private pages out, and never ends well: its hook has killed
        the tasks, or refused to serve their pages. (What is hidden it would have left out, and is missing after a
        restore all the same.)"""
        machine = self.machine
        await self._stand(PRE_DUMP)
        if not self.proceed or machine.copy != "running":
            return 1
        self.world.set_copy(machine, "frozen")
        await asyncio.sleep(0)
        if at_freeze is not None:
            at_freeze()
        if hidden is not None and machine.refusal:
            hidden.refusal = machine.refusal
        elif hidden is not None:
            for pid, address in machine.memory:
                hidden.visible(OUTER_PID + pid, address, address + PAGE_BYTES)
        if machine.files is not None:
            machine.files.update({**images_of(machine.memory, lazy=lazy), _TREE: b"tree"})
            await asyncio.sleep(_POLL_S)
        if machine.files is not None:
            machine.files.update({INVENTORY: b"inventory", _EMPTY: b""})
            await self._stand(POST_DUMP)
            if decision(self.journal) is True:
                self.world.set_copy(machine, "absent")
                return int(lazy)
        self.world.set_copy(machine, "running")
        return 1

    async def restore(self, hold: FakeImageHold) -> int:
        """A restore, with its exit status."""
        machine = self.machine
        hold.readers.add(self.pid)
        if not await hold.opened or machine.files is None or _MAP not in machine.files or machine.copy != "absent":
            return 1
        machine.memory, machine.missing = memory_of(machine.files)
        machine.registered = True
        if machine.missing:
            if machine.daemon is None:
                return 1
            machine.keepers.add("daemon")
            await machine.daemon(min(machine.missing))  # a restore touches a page here and there
        self.world.set_copy(machine, "held")
        await self._stand(POST_RESTORE)
        while (decided := decision(self.journal)) is None:  # noqa: ASYNC110 - the script has nothing but the file
            await asyncio.sleep(_POLL_S)
        if not machine.memory:
            return 1  # the guard has killed the tasks
        if decided:
            self.connected.set()
            await asyncio.sleep(0)
        self.world.set_copy(machine, "running" if decided else "absent")
        self.resumed.set()
        await asyncio.sleep(0)
        return 0 if decided else 1


def images_of(memory: dict[Page, bytes], *, lazy: bool) -> dict[str, bytes]:
    """The images that hold memory: which pages there are, and the contents of those that are not left out."""
    pages = sorted(memory)
    there = [page for page in pages if not (lazy and is_lazy(page))]
    listed = json.dumps([(*page, page in there) for page in pages]).encode()
    return {_MAP: listed, _PAGES: b"".join(memory[page] for page in there)}


def memory_of(files: dict[str, bytes]) -> tuple[dict[Page, bytes], set[Page]]:
    """What a restore makes of them: the memory, and the pages that are left to the daemon."""
    memory: dict[Page, bytes] = {}
    missing: set[Page] = set()
    for pid, address, there in json.loads(files[_MAP]):
        if there:
            begin = len(memory) * PAGE_BYTES
            memory[pid, address] = files[_PAGES][begin : begin + PAGE_BYTES]
        else:
            missing.add((pid, address))
    return memory, missing


class _Handle:
    """An agent's hold on a CRIU process: what dump and restore share."""

    def __init__(self, life: Life, run: FakeCriuRun, exit_status: asyncio.Task[int], failure: LivemoveError) -> None:
        self.life = life
        self.run = run
        self.exit = exit_status
        self.failure = failure

    async def stands_at(self, action: str) -> None:
        await self.life.verb(f"criu reaches {action}", self.failure)
        arrival = asyncio.ensure_future(self.run.reached[action].wait())
        try:
            await asyncio.wait((arrival, self.exit), return_when=asyncio.FIRST_COMPLETED)
        finally:
            arrival.cancel()
        if not self.run.reached[action].is_set():
            raise self.failure
        await self.life.checkpoint()

    def let_go(self) -> None:
        """See ``Dump`` and ``Restore``."""
        self.run.unlock_all()

    async def ended(self) -> int:
        await self.life.checkpoint()
        self.let_go()
        status = await asyncio.shield(self.exit)
        await self.life.verb("criu ends", self.failure)
        return status


H = TypeVar("H", bound=_Handle)


class FakeDump(_Handle):
    """A ``Dump`` in memory."""

    async def ready(self) -> None:
        """See ``Dump``."""
        await self.stands_at(PRE_DUMP)

    def freeze(self) -> None:
        """See ``Dump``."""
        self.run.proceed = True
        self.run.unlock(PRE_DUMP)

    async def dumped(self) -> None:
        """See ``Dump``."""
        await self.stands_at(POST_DUMP)

    def step_back(self) -> None:
        """See ``Dump``."""

    async def end(self) -> None:
        """See ``Dump``."""
        await self.ended()


class FakeRestore(_Handle):
    """A ``Restore`` in memory."""

    def __init__(self, life: Life, run: FakeCriuRun, exit_status: asyncio.Task[int], hold: ImageHold) -> None:
        super().__init__(life, run, exit_status, RestoreFailed("CRIU fails"))
        self._hold = hold

    async def loaded(self) -> None:
        """See ``Restore``."""
        await self.life.verb("criu loads", self.failure)
        while not self._hold.reached_by([self.run.pid]) and not self.exit.done():  # noqa: ASYNC110 - as the real one
            await asyncio.sleep(_POLL_S)
        if self.exit.done():
            raise self.failure
        await self.life.checkpoint()

    def begin(self) -> None:
        """See ``Restore``."""
        self._hold.complete()

    def let_go(self) -> None:
        """See ``Restore``."""
        self._hold.release()
        super().let_go()

    async def staged(self) -> int:
        """See ``Restore``."""
        await self.stands_at(POST_RESTORE)
        return self.run.pid

    async def connected(self) -> None:
        """See ``Restore``."""
        await self.life.verb("criu connects", self.failure)
        self.run.unlock(POST_RESTORE)
        await self._passes(self.run.connected)

    async def resumed(self) -> None:
        """See ``Restore``."""
        await self.life.verb("criu resumes", self.failure)
        await self._passes(self.run.resumed)

    async def _passes(self, stage: asyncio.Event) -> None:
        passing = asyncio.ensure_future(stage.wait())
        try:
            await asyncio.wait((passing, self.exit), return_when=asyncio.FIRST_COMPLETED)
        finally:
            passing.cancel()
        if not stage.is_set() and self.exit.result() != 0:
            raise self.failure
        await self.life.checkpoint()

    async def end(self) -> None:
        """See ``Restore``."""
        if await self.ended() != 0 and decision(self.run.journal) is True:
            raise self.failure


class FakeCheckpointer:
    """A ``Checkpointer`` whose processes outlive the agent."""

    def __init__(self, life: Life) -> None:
        self._life = life

    async def dump(
        self,
        command: Command,
        journal: Path,
        started: Started,
        *,
        root_pid: int,
        lazy: bool,
        hidden: HiddenPages | None = None,
        at_freeze: Callable[[], None] | None = None,
        external: tuple[str, ...] = (),
    ) -> Dump:
        """See ``Checkpointer``."""
        run = await self._start(journal, (PRE_DUMP, POST_DUMP), DumpFailed("CRIU does not start"))
        dumping = run.begin(run.dump(lazy=lazy, hidden=hidden, at_freeze=at_freeze))
        return await self._told(FakeDump(self._life, run, dumping, DumpFailed("CRIU fails")), started)

    async def restore(
        self,
        command: Command,
        journal: Path,
        started: Started,
        hold: ImageHold,
        *,
        lazy: bool,
        external: tuple[str, ...] = (),
    ) -> Restore:
        """See ``Checkpointer``."""
        assert isinstance(hold, FakeImageHold)
        with contextlib.ExitStack() as failing:
            failing.callback(hold.release)
            run = await self._start(journal, (POST_RESTORE,), RestoreFailed("CRIU does not start"))
            failing.pop_all()
        handle = FakeRestore(self._life, run, run.begin(run.restore(hold)), hold)
        return await self._told(handle, started)

    async def _start(self, journal: Path, actions: tuple[str, ...], failure: LivemoveError) -> FakeCriuRun:
        await self._life.verb("criu starts", failure)
        run = FakeCriuRun(self._life.world, self._life.machine, journal, actions)
        self._life.at_death.append(run.unlock_all)
        return run

    async def _told(self, handle: H, started: Started) -> H:
        # The instant between a process's start and the record of its pid is too short for this fake to stop at.
        started(handle.run.pid)
        try:
            await self._life.checkpoint()
        except asyncio.CancelledError:
            handle.let_go()  # as the real one does, when it is cancelled while its process starts
            raise
        return handle
