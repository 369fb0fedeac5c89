"""How urgent this agent's work is to the host it shares with a running service.

While memory is copied in rounds, the service and its clients come first: the agent has the least weight there is
(SCHED_BATCH and nice 19, sched(7)), and who wakes waits for it no longer than a tenth of a millisecond. In the freeze
it is the other way round: everybody waits for us. CRIU and the runtime inherit that; the tasks get their own scheduling
back, because CRIU restores it (criu/cr-restore.c). When they run, we and what CRIU and the runtime still have to do are
in the background again: all of it can wait, and clients do not.

That tenth is the thread's own slice (sched_runtime of sched_setattr(2), Linux 6.12; older ones ignore it). Linux lets
who runs finish its slice before somebody else that wakes (kernel/sched/fair.c, set_protect_slice), usually 3 ms, and
looks for its end at the clock's ticks, every 4 ms at 250 Hz. SCHED_IDLE would have no slice of its own, and means
nothing where the processor is shared out between groups.

A kernel with autogroups (`kernel.sched_autogroup_enabled`, on in Debian's) shares the processor out between sessions
first, and a thread's policy and nice value say nothing outside its own. So the group of our session gets a nice value
too (sched(7)): sshd makes us a session of our own, and so do the tasks that are restored. In the background it is the
last one, a hundredth of a processor on a host that never idles; or, where that is too little, a tenth (``pacing``).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from coordinator.agent.tasks import process_tree, threads

Pace = Literal["background", "urgent", "usual", "serving"]

_URGENT_NICE, _BACKGROUND_NICE = -10, 19
#: Of the session's group, a weight of 110 beside 1024 (kernel/sched/core.c, sched_prio_to_weight). That of 19 is 15.
_PRESSING_GROUP_NICE = 10
#: The shortest that Linux takes (kernel/sched/syscalls.c, __setparam_fair), in nanoseconds; 0: as everybody.
_SHORT_SLICE_NS = 100_000

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
#: struct sched_attr (include/uapi/linux/sched/types.h) as far as sched_period: size, policy, flags, nice, priority,
#: runtime, deadline, period.
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_char_p, ctypes.c_long)


def set_pace(pace: Pace) -> None:
    """``background``: let everybody else on this host go first. ``urgent``: go before ordinary processes, with all that
    this process has started, as a CRIU that was loaded in the background. ``usual``: be an ordinary process.
    ``serving``: an ordinary one that others wait for, and that works on when nobody does: who wakes does not wait long
    for it, nor it for others when it wakes."""
    background = pace == "background"
    policy = os.SCHED_BATCH if background else os.SCHED_OTHER
    slice_ns = _SHORT_SLICE_NS if pace in ("background", "serving") else 0
    nice = {"background": _BACKGROUND_NICE, "urgent": _URGENT_NICE}.get(pace, 0)
    for pid in process_tree(os.getpid()) if pace == "urgent" else [os.getpid()]:
        _set(pid, policy, nice, slice_ns)
        _set_group(pid, nice)


def press_on(pressing: bool) -> None:
    """In the background: have a tenth of the processor all the same, or no more."""
    _set_group(os.getpid(), _PRESSING_GROUP_NICE if pressing else _BACKGROUND_NICE)


def step_back(pids: Iterable[int]) -> None:
    """What was urgent has been done: let everybody else go before these processes. Their session's group becomes an
    ordinary one and no less, because restored tasks may have come to be in it."""
    for pid in pids:
        _set(pid, os.SCHED_BATCH, _BACKGROUND_NICE, _SHORT_SLICE_NS)
        _set_group(pid, 0)


def _set_group(pid: int, nice: int) -> None:
    with contextlib.suppress(OSError):  # it has ended, there are no autogroups, or no CAP_SYS_NICE: see below
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))


def _set(pid: int, policy: int, nice: int, slice_ns: int) -> None:
    """For every thread: in Linux these belong to threads, and new ones inherit them (sched(7)). Where that is refused
    (without CAP_SYS_NICE) nothing changes, which costs speed and nothing else."""
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, policy, 0, nice, 0, slice_ns, 0, 0)
    number = _SCHED_SETATTR.get(os.uname().machine, -1)
    for thread in threads(pid):
        _libc.syscall(number, thread, attributes, 0)
