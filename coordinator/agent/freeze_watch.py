"""Watches CRIU while it freezes the tasks: ends the nap that it takes, and tells when they all stand still.

**The nap.** CRIU freezes a container by its cgroup: it writes 1 to cgroup.freeze, looks at once whether all tasks are
frozen, and if not, sleeps for 100 ms before it looks again (criu/seize.c, freeze_processes). Tasks freeze within a
fraction of a millisecond, but seldom before that first look: so many a freeze would be 100 ms longer for nothing. So we
watch the same file, and when all are frozen and CRIU sleeps, its sleep ends as if a signal had come: nanosleep(2)
returns EINTR, which CRIU takes for the end of the nap. It may have looked, and sleep only in a while; but not any more
when the root is traced, which comes next.

**Standing still.** Then CRIU attaches to the tasks, those of a plain process tree in its only step, and stops each
(seize_cgroup_tree, collect_pstree). A task that is stopped for its tracer can be let go by nobody else, and CRIU does
so at the end of the dump; what it has a task do before that is its own code, with descriptors of its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from coordinator.agent.control_group import group_of_process
from coordinator.agent.memory import ptrace
from coordinator.agent.memory.ptrace import TargetGone, status_field
from coordinator.agent.memory.registers import Machine, this_machine
from coordinator.agent.tasks import process_tree, threads
from coordinator.errors import TrackingFailed

_PROC = Path("/proc")
#: nanosleep and clock_nanosleep.
_NAPS = {"x86_64": ("35", "230"), "aarch64": ("101", "115")}
_STOP_S, _LOOK_S = 0.05, 0.0003
#: How long CRIU may take until it traces the root; and how long, from then on, it is waited for the last task to stop.
_TRACED_S, _STILL_S = 2.0, 0.2
#: States of tasks that have stopped for their tracer, or ended (proc(5)).
_STILL = ("t", "Z", "X")


class FreezeWatch:
    """Watches over the freeze of one dump, in a thread that ends by itself soon after it, or when it is ended."""

    def __init__(self, command: int, root_pid: int, still: Callable[[], None] | None = None) -> None:
        """``command``: CRIU, or the runtime that has started it; ``root_pid``: the workload's first task. ``still`` is
        called in the thread when all tasks stand still, or not at all. It may raise ``OSError``."""
        self._command = command
        self._root_pid = root_pid
        self._still = still
        self._events = frozen_file(root_pid)
        self._ended = threading.Event()
        #: How often CRIU was woken.
        self.woken = 0

    def begin(self) -> None:
        """Watch from now on, if there can be something to see: without a cgroup version 2 CRIU takes no nap."""
        if self._events is not None or self._still is not None:
            threading.Thread(target=self._watch, name="freeze-watch", daemon=True).start()

    def end(self) -> None:
        """The dump is complete, or has failed."""
        self._ended.set()

    def _watch(self) -> None:
        machine = this_machine()
        until = time.monotonic() + _TRACED_S
        while not (traced := is_traced(self._root_pid)) and self._goes_on(until, _LOOK_S):
            if self._events is not None and machine is not None and not self.woken and is_frozen(self._events):
                self.woken += sum(end_sleep(pid, machine) for pid in sleepers(self._command))
        if self._still is None or not traced:
            return
        until = time.monotonic() + _STILL_S
        took_s = 0.0
        while self._goes_on(until, max(_LOOK_S, took_s)):
            began = time.monotonic()
            if stand_still(self._root_pid, self._command):
                with suppress(OSError):
                    self._still()
                return
            took_s = time.monotonic() - began

    def _goes_on(self, until: float, pause_s: float) -> bool:
        return not self._ended.wait(pause_s) and time.monotonic() < until


def is_traced(pid: int) -> bool:
    """Whether somebody has attached to a task."""
    return status_field(pid, "TracerPid") not in ("", "0")


def stand_still(root_pid: int, command: int) -> bool:
    """Whether every task of a tree has been stopped by one tracer, a descendant of the process ``command`` or itself:
    so none can begin another one, or has meanwhile."""
    tracer = status_field(root_pid, "TracerPid")
    tree = _tasks(root_pid)
    stopped = all(_stands_still(task, tracer) for tasks in tree.values() for task in tasks)
    return stopped and _tasks(root_pid) == tree and tracer in map(str, process_tree(command))


def _tasks(root_pid: int) -> dict[int, list[int]]:
    return {pid: threads(pid) for pid in process_tree(root_pid)}


def _stands_still(task: int, tracer: str) -> bool:
    state = status_field(task, "State")[:1]
    return state in _STILL and (state != "t" or status_field(task, "TracerPid") == tracer)


def frozen_file(pid: int) -> Path | None:
    """The cgroup.events of a process's cgroup version 2; ``None`` if it is in the root of what is seen here."""
    group = group_of_process(pid)
    return None if group is None else group / "cgroup.events"


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
