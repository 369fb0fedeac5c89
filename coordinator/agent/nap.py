"""Wakes CRIU from the nap it takes while a container freezes.

CRIU freezes a container by its cgroup: it writes 1 to cgroup.freeze, looks at once whether all tasks are frozen, and if
not, sleeps for 100 ms before it looks again (criu/seize.c, freeze_processes). Tasks freeze within a fraction of a
millisecond, but seldom before that first look: so many a freeze would be 100 ms longer for nothing. So we watch the
same file, and when all are frozen and CRIU sleeps, its sleep ends as if a signal had come: nanosleep(2) returns EINTR,
which CRIU takes for the end of the nap.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from coordinator.agent.memory import ptrace
from coordinator.agent.memory.ptrace import TargetGone
from coordinator.agent.memory.registers import Machine, this_machine
from coordinator.agent.tasks import process_tree
from coordinator.errors import TrackingFailed

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
#: nanosleep and clock_nanosleep.
_NAPS = {"x86_64": ("35", "230"), "aarch64": ("101", "115")}
_STOP_S, _LOOK_S = 0.05, 0.0003


class NapWatch:
    """Watches over the freeze of one dump, in a thread that ends by itself after ``bound_s``, or when it is ended."""

    def __init__(self, command: int, root_pid: int, bound_s: float = 2.0) -> None:
        """``command``: CRIU, or the runtime that has started it; ``root_pid``: the container's first task."""
        self._command = command
        self._events = frozen_file(root_pid)
        self._bound_s = bound_s
        self._ended = threading.Event()
        #: How often CRIU was woken.
        self.woken = 0

    def begin(self) -> None:
        """Watch from now on; without a cgroup version 2, or on a machine that is not known, there is nothing to see."""
        machine = this_machine()
        if self._events is not None and machine is not None:
            arguments = (self._events, machine)
            threading.Thread(target=self._watch, args=arguments, name="nap-watch", daemon=True).start()

    def end(self) -> None:
        """The dump is complete, or has failed."""
        self._ended.set()

    def _watch(self, events: Path, machine: Machine) -> None:
        until = time.monotonic() + self._bound_s
        while time.monotonic() < until and not self._ended.wait(_LOOK_S):
            if not is_frozen(events):
                continue
            for pid in sleepers(self._command):
                self.woken += end_sleep(pid, machine)
                return


def frozen_file(pid: int) -> Path | None:
    """The cgroup.events of a process's cgroup version 2; ``None`` if it is in the root of what is seen here."""
    try:
        lines = (_PROC / str(pid) / "cgroup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    for line in lines:
        if line.startswith("0::/") and (path := _CGROUP / line[len("0::/") :] / "cgroup.events").exists():
            return path
    return None


def is_frozen(events: Path) -> bool:
    """Whether every task of a cgroup is frozen (Documentation/admin-guide/cgroup-v2.rst, cgroup.events)."""
    try:
        return "frozen 1" in events.read_text()
    except OSError:
        return False


def sleepers(command: int) -> list[int]:
    """The CRIU processes below a command that are in a sleep."""
    naps = _NAPS.get(os.uname().machine, ())
    found = []
    for pid in process_tree(command):
        try:
            if (_PROC / str(pid) / "comm").read_text().strip() != "criu":
                continue
            if (_PROC / str(pid) / "syscall").read_text().split(maxsplit=1)[0] in naps:
                found.append(pid)
        except (OSError, IndexError):
            continue
    return found


def end_sleep(pid: int, machine: Machine) -> bool:
    """Make a sleep return EINTR; whether there was one to end. A process that cannot be stopped sleeps on."""
    try:
        ptrace.seize(pid, 0)
        try:
            ptrace.request(ptrace.INTERRUPT, pid)
            ptrace.wait_stop(pid, _STOP_S)
            registers = ptrace.get_registers(pid, machine.register_bytes)
            ended = machine.end_sleep(registers)
            if ended is not None:
                ptrace.set_registers(pid, ended)
            return ended is not None
        finally:
            ptrace.request(ptrace.DETACH, pid)
    except (TargetGone, ptrace.Unresponsive, TrackingFailed, OSError):
        return False
