"""The one door to CRIU, and the hold at its hooks.

CRIU runs an action script at each stage of a dump or restore (CRIU, Documentation/criu.txt, "--action-script"), also
under runc, because CRIU reads the file named by ``CRIU_CONFIG_FILE`` in RPC mode too (criu/config.c). Ours waits at

- ``pre-dump``: everything is loaded, nothing is frozen yet: the gate is closed in this very moment;
- ``post-dump``: the images are complete, the tasks frozen. Success lets CRIU kill them, failure thaws them with their
  connections (criu/cr-dump.c, cr_dump_finish);
- ``post-restore``: everything exists, nothing has run. Success lets the tasks run, failure kills them
  (criu/cr-restore.c, restore_root_task).

Waiting is a shared ``flock`` on a file that the agent has locked. The kernel drops that lock when the agent ends,
however it ends, and what the script does then is decided by the journal alone:

- I3: at post-dump it succeeds if and only if the source's journal has COMMITTED. A source whose agent was killed thaws
  by itself before the commit point, and never after it.
- I1: at post-restore it succeeds only if the destination's journal has COMMITTED, which that half writes on the
  source's GO. With neither COMMITTED nor ABORTED it goes on waiting: in doubt, a destination never guesses.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from coordinator.agent.images import ImageHold
from coordinator.agent.memory.hidden_pages import HiddenPages
from coordinator.agent.memory.scan_filter import ScanFilter
from coordinator.agent.nap import NapWatch
from coordinator.agent.process import Command, Running, describe_failure, first_explaining_line, start
from coordinator.agent.tasks import process_tree
from coordinator.errors import DumpFailed, LivemoveError, RestoreFailed

PRE_DUMP, POST_DUMP, POST_RESTORE, POST_RESUME = "pre-dump", "post-dump", "post-restore", "post-resume"

#: Is told the pid of a command.
Started = Callable[[int], None]

#: One option a line, as CRIU's parser wants it. ghost-limit: obstacles.MOST_DELETED_BYTES (CRIU's own is 1 MiB).
_CONFIG = "network-lock skip\nghost-limit 33554432\naction-script {script}\n{lazy}"
#: Not every runtime has an option for it (crun has none).
_LAZY = "lazy-pages\n"

#: How a hook says yes. A dump without its lazy pages goes on, after a successful post-dump, to serve them by itself
#: until somebody has fetched them all, and it thaws the tasks if that fails (criu/cr-dump.c, cr_lazy_mem_dump). So the
#: hook kills the frozen tasks on a commit, and refuses the serving at its next stage, status-ready. Post-dump itself
#: must succeed: a failure takes the connections out of repair mode, and they would be closed with a FIN that nobody
#: gets, and stay behind in FIN-WAIT-1 for minutes.
_GO_ON = "exit 0"
_KILL = "kill -KILL $(cat {tasks}); exit 0"

_SCRIPT = """#!/bin/sh
# Written by livemove for one migration: holds CRIU until the journal says how the migration ended.
case "$CRTOOLS_SCRIPT_ACTION" in
{actions}) ;;
status-ready) exit {status_ready} ;;
post-resume) echo "post-resume $CRTOOLS_INIT_PID" 1<>{reached}; exit 0 ;;
*) exit 0 ;;
esac
echo "$CRTOOLS_SCRIPT_ACTION" "$CRTOOLS_INIT_PID" 1<>{reached}
{flock} -s {hold}."$CRTOOLS_SCRIPT_ACTION" true
decide() {{
    while read -r line; do
        case "$line" in
        *'"phase":"COMMITTED"'*) {committed} ;;
        *'"phase":"ABORTED"'*) exit 1 ;;
        esac
    done <{journal}
}}
case "$CRTOOLS_SCRIPT_ACTION" in
pre-dump) [ -e {proceed} ]; exit ;;
post-dump) decide; exit 1 ;;
post-restore) while :; do decide; sleep 0.1; done ;;
esac
"""


#: Stands before ``tar`` in CRIU's PATH. CRIU has tar pack every tmpfs of a container, with --gzip (criu/filesystems.c,
#: tmpfs_dump): a shell and a gzip more, in the freeze and on both hosts, for what is mostly a few empty directories.
_TAR = """#!/bin/sh
# Written by livemove for one migration: no compression of images that never leave memory.
if [ "$2" = --gzip ]; then
    action=$1
    shift 2
    set -- "$action" "$@"
fi
exec {tar} "$@"
"""


class Hook:
    """The action script of one CRIU run, its configuration file, and the locks it waits for."""

    def __init__(self, folder: Path, journal: Path, actions: tuple[str, ...], *, lazy: bool) -> None:
        """Write script and configuration to ``folder`` (on a file system without noexec) and take the locks."""
        lazy_dump = lazy and POST_DUMP in actions
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.config = folder / "criu.conf"
        #: To stand first in CRIU's PATH.
        self.programs = folder / "bin"
        self._folder = folder
        self._proceed = folder / "proceed"
        script = folder / "hook"
        reached = folder / "reached"
        os.mkfifo(reached, 0o600)
        flock = shutil.which("flock")
        if flock is None:
            raise DumpFailed("flock(1) of util-linux is not installed on this host", "Install util-linux.")
        self._tasks = folder / "tasks"
        names = {"reached": reached, "hold": folder / "hold", "journal": journal, "proceed": self._proceed}
        quoted = {name: shlex.quote(str(path)) for name, path in names.items()}
        committed = _KILL.format(tasks=shlex.quote(str(self._tasks))) if lazy_dump else _GO_ON
        values = {"flock": shlex.quote(flock), "committed": committed, "status_ready": int(lazy_dump)}
        script.write_text(_SCRIPT.format(actions="|".join(actions), **values, **quoted))
        script.chmod(0o700)
        self.config.write_text(_CONFIG.format(script=script, lazy=_LAZY if lazy else ""))
        if (tar := shutil.which("tar")) is not None:
            shim = self.programs / "tar"
            self.programs.mkdir(mode=0o700)
            shim.write_text(_TAR.format(tar=shlex.quote(tar)))
            shim.chmod(0o700)
        # Read-write, so that neither side ever waits for the other to open its end (fifo(7), Linux).
        self._reached = os.open(reached, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._locks = {action: self._lock(action) for action in actions}

    def _lock(self, action: str) -> int:
        descriptor = os.open(self._folder / f"hold.{action}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor

    async def reached(self, action: str) -> int:
        """Return when CRIU stands at ``action``, with the pid of the root task."""
        arrived: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def readable() -> None:
            with contextlib.suppress(BlockingIOError):
                for line in os.read(self._reached, 4096).decode().splitlines():
                    reached, _, root_pid = line.partition(" ")
                    if reached == action and not arrived.done():
                        arrived.set_result(int(root_pid or 0))

        asyncio.get_running_loop().add_reader(self._reached, readable)
        try:
            return await arrived
        finally:
            asyncio.get_running_loop().remove_reader(self._reached)

    def doom(self, pids: Sequence[int]) -> None:
        """Name the frozen tasks that a lazy dump's hook kills on a commit."""
        self._tasks.write_text(" ".join(map(str, pids)))

    def allow(self) -> None:
        """Let a CRIU that stands at ``pre-dump`` go on, rather than give up."""
        self._proceed.touch()

    def release(self, action: str) -> None:
        """Let CRIU go on from ``action``: the journal tells it where to. Repeating it is harmless."""
        descriptor = self._locks.pop(action, -1)
        if descriptor >= 0:
            os.close(descriptor)

    def close(self) -> None:
        """Release everything that is still held."""
        for action in tuple(self._locks):
            self.release(action)
        if self._reached >= 0:
            os.close(self._reached)
            self._reached = -1


class Dump(Protocol):
    """A dump under way, held at its hooks."""

    async def ready(self) -> None:
        """Return when CRIU stands directly before the freeze."""

    def freeze(self, root_pid: int) -> None:
        """Let CRIU freeze the tasks, the first of which is ``root_pid``, and write the images."""

    async def dumped(self) -> None:
        """Return when the images are complete and the tasks frozen; raise ``DumpFailed`` if that cannot be reached."""

    def let_go(self) -> None:
        """Release the hold and wait for nothing: from here on CRIU follows the journal by itself."""

    async def end(self) -> None:
        """Release the hold, wait for CRIU's end: the tasks are killed if the journal has COMMITTED, else they run."""


class Restore(Protocol):
    """A restore under way, held at its hook."""

    def begin(self) -> None:
        """The images are complete: let CRIU read them."""

    async def staged(self) -> int:
        """Return when everything exists and nothing has run, with the pid of the root task; raise ``RestoreFailed`` if
        that cannot be reached."""

    def let_go(self) -> None:
        """Release the hold and wait for nothing: from here on CRIU follows the journal by itself."""

    async def resumed(self) -> None:
        """Release the hold and return as soon as the tasks run, which is before CRIU and the runtime have ended.

        Precondition: the journal has COMMITTED. Raises ``RestoreFailed`` if they do not run."""

    async def end(self) -> None:
        """Release the hold and wait for CRIU's end: the tasks run if the journal has COMMITTED, else they are killed.

        Raises ``RestoreFailed`` if the journal has COMMITTED and the tasks do not run."""


class Checkpointer(Protocol):
    """Starts CRIU, through a runtime's command, held at our hooks."""

    async def dump(
        self, command: Command, journal: Path, started: Started, *, lazy: bool, hidden: HiddenPages | None = None
    ) -> Dump:
        """Start a dump, ``lazy`` if it is to leave private memory to us; returns as soon as the command runs.

        ``hidden`` decides which pages CRIU is not to see, or says after the dump why it has seen them all."""

    async def restore(
        self, command: Command, journal: Path, started: Started, hold: ImageHold, *, lazy: bool
    ) -> Restore:
        """Start a restore, up to where it needs images (see ``Restore.begin``); returns as soon as the command runs.

        ``hold`` is let go with the restore. ``lazy``: the tasks' private memory follows later."""


class CriuRun:
    """One CRIU command with its hook: what dump and restore share."""

    def __init__(self, running: Running, hook: Hook, work: Path, error: type[LivemoveError]) -> None:
        self._running = running
        self._hook = hook
        self._work = work
        self._error = error
        self._exit = asyncio.ensure_future(running.wait())

    async def _stands_at(self, action: str) -> int:
        arrival = asyncio.ensure_future(self._hook.reached(action))
        try:
            await asyncio.wait((arrival, self._exit), return_when=asyncio.FIRST_COMPLETED)
            if not arrival.done():
                raise self._failure()
            return arrival.result()
        finally:
            arrival.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await arrival

    def let_go(self) -> None:
        """See ``Dump`` and ``Restore``."""
        self._hook.close()

    async def _ended(self) -> int:
        self.let_go()
        return await asyncio.shield(self._exit)

    def _failure(self) -> LivemoveError:
        status = self._exit.result()
        return self._error(describe_failure(self._running.command, status, self._explanation()))

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

    def __init__(self, running: Running, hook: Hook, work: Path, scans: ScanFilter) -> None:
        super().__init__(running, hook, work, DumpFailed)
        self._scans = scans
        self._dumping = contextlib.ExitStack()

    async def ready(self) -> None:
        """See ``Dump``."""
        await self._stands_at(PRE_DUMP)

    def freeze(self, root_pid: int) -> None:
        """See ``Dump``."""
        watch = NapWatch(self._running.pid, root_pid)
        self._dumping.callback(watch.end)
        self._dumping.callback(self._scans.close)
        watch.begin()
        self._scans.arm(self._running.pid)
        self._hook.allow()
        self._hook.release(PRE_DUMP)

    async def dumped(self) -> None:
        """See ``Dump``."""
        with self._dumping:
            root_pid = await self._stands_at(POST_DUMP)
        self._hook.doom(process_tree(root_pid))

    async def end(self) -> None:
        """See ``Dump``."""
        await self._ended()


class CriuRestore(CriuRun):
    """A real restore (see ``Restore``)."""

    def __init__(self, running: Running, hook: Hook, work: Path, journal: Path, hold: ImageHold) -> None:
        super().__init__(running, hook, work, RestoreFailed)
        self._journal = journal
        self._hold = hold

    def let_go(self) -> None:
        """See ``Restore``."""
        self._hold.release()
        super().let_go()

    def begin(self) -> None:
        """See ``Restore``."""
        self._hold.complete()

    async def staged(self) -> int:
        """See ``Restore``."""
        return await self._stands_at(POST_RESTORE)

    async def resumed(self) -> None:
        """See ``Restore``."""
        running = asyncio.ensure_future(self._hook.reached(POST_RESUME))
        try:
            self._hook.release(POST_RESTORE)
            await asyncio.wait((running, self._exit), return_when=asyncio.FIRST_COMPLETED)
            if not running.done() and self._exit.result() != 0:
                raise self._failure()
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    async def end(self) -> None:
        """See ``Restore``. After an abort CRIU fails, as it should: that is not our error."""
        status = await self._ended()
        if status != 0 and '"phase":"COMMITTED"' in self._journal.read_text():
            raise self._failure()


class HeldCriu:
    """The real ``Checkpointer``: hook and logs live in ``work``, inside the migration's image space."""

    def __init__(self, work: Path, images: Path) -> None:
        self._work = work
        self._images = images

    async def dump(
        self, command: Command, journal: Path, started: Started, *, lazy: bool, hidden: HiddenPages | None = None
    ) -> Dump:
        """See ``Checkpointer``."""
        hook = Hook(self._work / "hook", journal, (PRE_DUMP, POST_DUMP), lazy=lazy)
        running = await self._start(command, hook, started)
        return CriuDump(running, hook, self._work, ScanFilter(hidden, self._images))

    async def restore(
        self, command: Command, journal: Path, started: Started, hold: ImageHold, *, lazy: bool
    ) -> Restore:
        """See ``Checkpointer``."""
        with contextlib.ExitStack() as failing:
            failing.callback(hold.release)
            hook = Hook(self._work / "hook", journal, (POST_RESTORE,), lazy=lazy)
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
