"""A plain process tree, known by its root: a pid file, or a pid that stays the same because CRIU restores it."""

from __future__ import annotations

import shutil
from pathlib import Path

from coordinator.agent.process import Command, start_time
from coordinator.agent.runtimes.base import Definition, Tasks
from coordinator.errors import ProtocolError, RestoreFailed
from coordinator.facts import WorkloadSpec


class ProcessTree:
    """A process and all its descendants, dumped and restored with ``criu`` itself under the same pids.

    ``expected_pids`` are the pids and thread ids that a restore needs to be free, the root's first."""

    def __init__(self, workload: WorkloadSpec, expected_pids: tuple[int, ...] = (), proc: Path = Path("/proc")) -> None:
        if (workload.pid_file is None) == (workload.root_pid is None):
            raise ProtocolError(f"workload {workload.name}: a process workload has a pid_file or a root_pid")
        self._pid_file = Path(workload.pid_file) if workload.pid_file is not None else None
        self._root_pid = workload.root_pid
        self._expected = expected_pids
        self._proc = proc

    async def find(self) -> Tasks:
        """See ``Runtime``. A pid file that names no living process counts as stopped."""
        pid = self._read_pid()
        if pid is None:
            return Tasks("absent")
        if start_time(pid, self._proc) is None:
            return Tasks("absent" if self._pid_file is None else "stopped")
        return Tasks("running", pid)

    def _read_pid(self) -> int | None:
        if self._pid_file is None:
            return self._root_pid
        try:
            text = self._pid_file.read_text().strip()
        except FileNotFoundError:
            return None
        return int(text) if text.isdigit() and int(text) > 1 else None

    async def definition(self) -> Definition:
        """See ``Runtime``. A process is defined by nothing but its own files."""
        return Definition()

    async def prepare_restore(self) -> None:
        """See ``Runtime``."""
        if taken := taken_pids(self._expected, self._proc):
            raise RestoreFailed(
                f"process id {taken[0]} is in use on this host, and the workload has to have it again",
                "Move it at another time, run it in a container, or restart it under a pid that is free here.",
            )
        if shutil.which("criu") is None:
            raise RestoreFailed("criu is not installed on this host", "Install criu.")

    def dump_command(self, tasks: Tasks, images: Path, work: Path, *, lazy: bool) -> Command:
        """See ``Runtime``."""
        options = ("--tree", str(tasks.root_pid), "--log-file", "dump.log")
        return Command(("criu", "dump", *options, *self._options(images, work)), {})

    def restore_command(self, images: Path, work: Path, *, lazy: bool) -> Command:
        """See ``Runtime``."""
        options = ("--restore-detached", "--log-file", "restore.log")
        return Command(("criu", "restore", *options, *self._options(images, work)), {})

    @staticmethod
    def _options(images: Path, work: Path) -> tuple[str, ...]:
        folders = ("--images-dir", str(images), "--work-dir", str(work))
        return (*folders, "--tcp-established", "--file-locks", "-v2")

    async def adopt(self) -> int:
        """See ``Runtime``: writes the pid file, for whoever supervises the process here."""
        root_pid = self._expected[0]
        if start_time(root_pid, self._proc) is None:
            raise RestoreFailed(f"after the restore there is no process {root_pid}")
        if self._pid_file is not None:
            self._pid_file.write_text(f"{root_pid}\n")
        return root_pid

    async def forget(self) -> None:
        """See ``Runtime``: removes the pid file."""
        if self._pid_file is not None:
            self._pid_file.unlink(missing_ok=True)

    async def discard(self) -> None:
        """See ``Runtime``: CRIU leaves nothing but images."""


def taken_pids(pids: tuple[int, ...], proc: Path = Path("/proc")) -> list[int]:
    """Those of ``pids`` that are a process or a thread here; /proc has every thread id, though it lists none."""
    return [pid for pid in pids if (proc / str(pid)).exists()]
