"""The one door to CRIU: dumps and restores, started through a runtime's command and held at our hooks (``hook``)."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from coordinator.agent import priority
from coordinator.agent.criu_filter import CriuFilter
from coordinator.agent.freeze_watch import FreezeWatch
from coordinator.agent.group_moves import GroupMoves
from coordinator.agent.hook import POST_DUMP, POST_RESTORE, POST_RESUME, PRE_DUMP, PRE_RESUME, Hook
from coordinator.agent.images import ImageHold
from coordinator.agent.memory.hidden_pages import HiddenPages
from coordinator.agent.process import Command, Running, describe_failure, first_explaining_line, start
from coordinator.agent.tasks import process_tree
from coordinator.agent.terminals import mend
from coordinator.errors import DumpFailed, LivemoveError, RestoreFailed

#: How long it is waited until CRIU is loaded, and how long between two looks.
_LOAD_S, _LOAD_LOOK_S = 1.0, 0.005

#: Is told the pid of a command.
Started = Callable[[int], None]


class Dump(Protocol):
    """A dump under way, held at its hooks."""

    async def ready(self) -> None:
        """Return when CRIU stands directly before the freeze."""

    def freeze(self) -> None:
        """Let CRIU freeze the tasks and write the images."""

    async def dumped(self) -> None:
        """Return when the images are complete and the tasks frozen; raise ``DumpFailed`` if that cannot be reached."""

    def let_go(self) -> None:
        """Release the hold and wait for nothing: from here on CRIU follows the journal by itself."""

    async def end(self) -> None:
        """Release the hold, wait for CRIU's end: the tasks are killed if the journal has COMMITTED, else they run."""

    def step_back(self) -> None:
        """The tasks run on the destination: nobody waits for what CRIU still does here."""


class Restore(Protocol):
    """A restore under way, held at its hook."""

    async def loaded(self) -> None:
        """Return when CRIU has come as far as it can without images; or after a second, as that is only slower. Raise
        ``RestoreFailed`` if it has ended."""

    def begin(self) -> None:
        """The images are complete: let CRIU read them."""

    async def staged(self) -> int:
        """Return when everything exists and nothing has run, with the pid of the root task; raise ``RestoreFailed`` if
        that cannot be reached."""

    def let_go(self) -> None:
        """Release the hold and wait for nothing: from here on CRIU follows the journal by itself."""

    async def connected(self) -> None:
        """Release the hold and return as soon as every socket takes packets, which is directly before the tasks run.

        Precondition: the journal has COMMITTED. Raises ``RestoreFailed`` if it does not come to that."""

    async def resumed(self) -> None:
        """Return as soon as the tasks run, which is before CRIU and the runtime have ended; after ``connected``.

        Raises ``RestoreFailed`` if they do not run."""

    async def end(self) -> None:
        """Release the hold and wait for CRIU's end: the tasks run if the journal has COMMITTED, else they are killed.

        Raises ``RestoreFailed`` if the journal has COMMITTED and the tasks do not run."""


class Checkpointer(Protocol):
    """Starts CRIU, through a runtime's command, held at our hooks."""

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
        """Start a dump of the tasks of which ``root_pid`` is the first; returns as soon as the command runs.

        ``lazy``: private memory is left to us. ``hidden`` decides which pages CRIU is not to see, or says after the
        dump why it has seen them all. ``at_freeze`` is called, where the kernel allows it, when all tasks are frozen
        and CRIU has touched nothing. ``external``: what CRIU leaves to us, in the words of its option (criu(8),
        --external)."""

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
        """Start a restore, up to where it needs images (see ``Restore.begin``); returns as soon as the command runs.

        ``hold`` is let go with the restore. ``lazy``: the tasks' private memory follows later. ``external``: what CRIU
        gets from us, in the words of its option."""


class CriuRun:
    """One CRIU command with its hook: what dump and restore share."""

    def __init__(self, running: Running, hook: Hook, work: Path, error: type[LivemoveError]) -> None:
        self._running = running
        self._hook = hook
        self._work = work
        self._error = error
        self._exit = asyncio.ensure_future(running.wait())

    async def _stands_at(self, action: str) -> int:
        arrival = self._hook.arrival(action)
        await asyncio.wait((arrival, self._exit), return_when=asyncio.FIRST_COMPLETED)
        if not arrival.done():
            raise self._failure()
        return arrival.result()

    def let_go(self) -> None:
        """See ``Dump`` and ``Restore``."""
        self._hook.close()

    async def _ended(self) -> int:
        self.let_go()
        return await asyncio.shield(self._exit)

    def _failure(self) -> LivemoveError:
        return self._error(describe_failure(self._running.command, self._exit.result(), self._explanation()))

    def _explanation(self) -> str:
        """CRIU's own first error, or what the runtime said."""
        for name in ("dump.log", "restore.log", "output"):
            with contextlib.suppress(FileNotFoundError):
                text = (self._work / name).read_text(errors="replace")
                if "error" in text.lower() or name == "output":
                    return first_explaining_line(text)
        return "no output"


class CriuDump(CriuRun):
    """A real dump (see ``Dump``)."""

    def __init__(
        self, running: Running, hook: Hook, work: Path, *, images: Path, root_pid: int, over: CriuFilter
    ) -> None:
        super().__init__(running, hook, work, DumpFailed)
        self._images = images
        self._root_pid = root_pid
        self._filter = over
        self._dumping = contextlib.ExitStack()

    async def ready(self) -> None:
        """See ``Dump``."""
        await self._stands_at(PRE_DUMP)
        await asyncio.to_thread(self._filter.look)

    def freeze(self) -> None:
        """See ``Dump``."""
        watch = FreezeWatch(self._running.pid, self._root_pid, self._filter.at_stillness)
        self._dumping.callback(watch.end)
        self._dumping.callback(self._filter.close)
        watch.begin()
        self._filter.arm(self._running.pid)
        self._hook.allow()
        self._hook.release(PRE_DUMP)

    async def dumped(self) -> None:
        """See ``Dump``."""
        with self._dumping:
            root_pid = await self._stands_at(POST_DUMP)
        mend(self._images)
        self._hook.doom(process_tree(root_pid))

    async def end(self) -> None:
        """See ``Dump``."""
        await self._ended()

    def step_back(self) -> None:
        """See ``Dump``."""
        priority.step_back(process_tree(self._running.pid))


class CriuRestore(CriuRun):
    """A real restore (see ``Restore``)."""

    def __init__(self, running: Running, hook: Hook, work: Path, journal: Path, hold: ImageHold) -> None:
        super().__init__(running, hook, work, RestoreFailed)
        self._journal = journal
        self._hold = hold
        self._moves = GroupMoves.begun()
        self._root_pid = 0
        self._resumed = False

    def let_go(self) -> None:
        """See ``Restore``."""
        self._moves.end()
        self._hold.release()
        super().let_go()

    async def loaded(self) -> None:
        """See ``Restore``."""
        loop = asyncio.get_running_loop()
        until = loop.time() + _LOAD_S
        while loop.time() < until and not self._hold.reached_by(process_tree(self._running.pid)):
            await asyncio.wait((self._exit,), timeout=_LOAD_LOOK_S)
            if self._exit.done():
                raise self._failure()

    def begin(self) -> None:
        """See ``Restore``."""
        self._hold.complete()

    async def staged(self) -> int:
        """See ``Restore``."""
        try:
            self._root_pid = await self._stands_at(POST_RESTORE)
        finally:
            self._moves.end()
        return self._root_pid

    async def connected(self) -> None:
        """See ``Restore``."""
        self._hook.release(POST_RESTORE)
        await self._passes(PRE_RESUME)

    async def resumed(self) -> None:
        """See ``Restore``."""
        await self._passes(POST_RESUME)
        self._resumed = True

    async def _passes(self, action: str) -> None:
        passed = self._hook.arrival(action)
        await asyncio.wait((passed, self._exit), return_when=asyncio.FIRST_COMPLETED)
        if not passed.done() and self._exit.result() != 0:
            raise self._failure()

    async def end(self) -> None:
        """See ``Restore``. After an abort CRIU fails, as it should: that is not our error. When the tasks run, nobody
        waits for what it still does."""
        if self._resumed:
            priority.step_back(set(process_tree(self._running.pid)) - set(process_tree(self._root_pid)))
        status = await self._ended()
        if status != 0 and '"phase":"COMMITTED"' in self._journal.read_text():
            raise self._failure()


class HeldCriu:
    """The real ``Checkpointer``: hook and logs live in ``work``, inside the migration's image space."""

    def __init__(self, work: Path, images: Path) -> None:
        self._work = work
        self._images = images

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
        hook = Hook(self._work / "hook", journal, (PRE_DUMP, POST_DUMP), lazy=lazy, external=external)
        running = await self._start(command, hook, started)
        over = CriuFilter(root_pid, hidden, self._images, at_freeze)
        return CriuDump(running, hook, self._work, images=self._images, root_pid=root_pid, over=over)

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
        with contextlib.ExitStack() as failing:
            failing.callback(hold.release)
            hook = Hook(self._work / "hook", journal, (POST_RESTORE,), lazy=lazy, external=external)
            running = await self._start(command, hook, started)
            failing.pop_all()
        return CriuRestore(running, hook, self._work, journal, hold)

    async def _start(self, command: Command, hook: Hook, started: Started) -> Running:
        path = f"{hook.programs}:{os.environ['PATH']}"
        held = Command(command.argv, {**command.environment, "CRIU_CONFIG_FILE": str(hook.config), "PATH": path})
        starting = asyncio.ensure_future(start(held, self._work / "output"))
        try:
            running = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # It runs all the same. Told of its pid, our caller can wait until it has read the journal and ended.
            with contextlib.suppress(LivemoveError):
                started((await starting).pid)
            hook.close()
            raise
        except BaseException:
            hook.close()
            raise
        started(running.pid)
        return running
