"""The hold at CRIU's hooks: the action script that CRIU runs, its configuration file, and the locks it waits for.

CRIU runs an action script at each stage of a dump or restore (CRIU, Documentation/criu.txt, "--action-script"), also
under runc, because CRIU reads the file named by ``CRIU_CONFIG_FILE`` in RPC mode too (criu/config.c). Ours waits at

- ``pre-dump``: everything is loaded, nothing is frozen yet: the gate is closed in this very moment;
- ``post-dump``: the images are complete, the tasks frozen. Success lets CRIU kill them, failure thaws them with their
  connections (criu/cr-dump.c, cr_dump_finish);
- ``post-restore``: everything exists, nothing has run. Success lets the tasks run, failure kills them
  (criu/cr-restore.c, restore_root_task).

It tells of ``pre-resume``, when every socket is out of repair mode and takes packets, and of ``post-resume``, when the
tasks run.

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
from collections.abc import Sequence
from pathlib import Path

from coordinator.agent.obstacles import MOST_DELETED_BYTES
from coordinator.agent.quiet_criu import Requests
from coordinator.errors import DumpFailed

PRE_DUMP, POST_DUMP, POST_RESTORE = "pre-dump", "post-dump", "post-restore"
#: Only told, not waited at.
PRE_RESUME, POST_RESUME = "pre-resume", "post-resume"

#: One option a line, as CRIU's parser wants it. CRIU's own ghost-limit is 1 MiB.
_CONFIG = "network-lock skip\nghost-limit {most_deleted}\naction-script {script}\n{lazy}{external}"
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
pre-resume|post-resume) echo "$CRTOOLS_SCRIPT_ACTION" "$CRTOOLS_INIT_PID" 1<>{reached}; exit 0 ;;
*) exit 0 ;;
esac
decide() {{
    while read -r line; do
        case "$line" in
        *'"phase":"COMMITTED"'*) {committed} ;;
        *'"phase":"ABORTED"'*) exit 1 ;;
        esac
    done
}}
echo "$CRTOOLS_SCRIPT_ACTION" "$CRTOOLS_INIT_PID" 1<>{reached}
# A shell reads byte by byte. What is there already is read before the wait, and what comes by then may be lost in it;
# the rest, and if that does not decide everything once more, behind it.
if [ -r {journal} ]; then exec 8<{journal}; else exec 8</dev/null; fi
while read -r line <&8; do :; done
{flock} -s 9 9<{hold}."$CRTOOLS_SCRIPT_ACTION"
case "$CRTOOLS_SCRIPT_ACTION" in
pre-dump) [ -e {proceed} ]; exit ;;
post-dump) decide <&8; decide <{journal}; exit 1 ;;
post-restore) decide <&8; while :; do decide <{journal}; sleep 0.1; done ;;
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
exec {program} "$@"
"""

#: Stands before ``criu`` in a runtime's PATH (``quiet_criu``).
_CRIU = """#!/bin/sh
# Written by livemove for one migration: no debug log of every step in the freeze.
if [ "$1" = swrk ] && [ -e {door} ]; then
    echo swrk $$ "$2" 1<>{reached}
    read -r _ <{door}
fi
exec {program} "$@"
"""


class Hook:
    """The action script of one CRIU run, its configuration file, and the locks it waits for."""

    def __init__(
        self, folder: Path, journal: Path, actions: tuple[str, ...], *, lazy: bool, external: tuple[str, ...] = ()
    ) -> None:
        """Write script and configuration to ``folder`` (on a file system without noexec) and take the locks.

        ``external``: see ``Checkpointer``."""
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
        options = {"most_deleted": MOST_DELETED_BYTES, "script": script, "lazy": _LAZY if lazy else ""}
        options["external"] = "".join(f"external {each}\n" for each in external)
        self.config.write_text(_CONFIG.format(**options))
        self.programs.mkdir(mode=0o700)
        door = folder / "door"
        self._requests = Requests(door)
        self._stand_before("tar", _TAR)
        self._stand_before("criu", _CRIU, reached=quoted["reached"], door=shlex.quote(str(door)))
        # Read-write, so that neither side ever waits for the other to open its end (fifo(7), Linux).
        self._reached = os.open(reached, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._locks = {action: self._lock(action) for action in actions}
        self._arrivals: dict[str, asyncio.Future[int]] = {}
        asyncio.get_running_loop().add_reader(self._reached, self._hear)

    def _stand_before(self, name: str, script: str, **values: str) -> None:
        """Have a script run in the place of a program of this host's."""
        if (program := shutil.which(name)) is not None:
            shim = self.programs / name
            shim.write_text(script.format(program=shlex.quote(program), **values))
            shim.chmod(0o700)

    def _lock(self, action: str) -> int:
        descriptor = os.open(self._folder / f"hold.{action}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor

    def arrival(self, action: str) -> asyncio.Future[int]:
        """Done when CRIU stands at ``action``, with the pid of the root task. Nobody but us may cancel it."""
        return self._arrivals.setdefault(action, asyncio.get_running_loop().create_future())

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for line in os.read(self._reached, 4096).decode().splitlines():
                action, _, root_pid = line.partition(" ")
                if action == "swrk":
                    self._requests.arrived(*map(int, root_pid.split()))
                elif not (arrival := self.arrival(action)).done():
                    arrival.set_result(int(root_pid or 0))

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
        self._requests.close()
        if self._reached >= 0:
            asyncio.get_running_loop().remove_reader(self._reached)
            os.close(self._reached)
            self._reached = -1
