"""How urgent this agent's work is to the host it shares with a running service.

While memory is copied in rounds, the service and its clients come first: the agent runs only when nobody else wants to
(SCHED_IDLE, sched(7)). In the freeze it is the other way round: everybody waits for us. CRIU and the runtime inherit
that; the tasks get their own scheduling back, because CRIU restores it (criu/cr-restore.c).

A kernel with autogroups (`kernel.sched_autogroup_enabled`, on in Debian's) shares the processor out between sessions
first, and a thread's policy and nice value say nothing outside its own. So the group of our session gets a nice value
too (sched(7)): sshd makes us a session of our own, and so do the tasks that are restored. In the background it is one
with which a session of the service's that wakes goes first, and which keeps a tenth of the processor for us on a host
that is busy: copying must not stand still.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Literal

from coordinator.agent.tasks import process_tree, threads

Pace = Literal["background", "urgent", "usual"]

_URGENT_NICE = -10
#: Of the session's group, beside SCHED_IDLE within it: a weight of 110 beside 1024 (kernel/sched/core.c,
#: sched_prio_to_weight).
_BACKGROUND_NICE = 10


def set_pace(pace: Pace) -> None:
    """``background``: let everybody else on this host go first. ``urgent``: go before ordinary processes, with all that
    this process has started, as a CRIU that was loaded in the background. ``usual``: be an ordinary process."""
    policy = os.SCHED_IDLE if pace == "background" else os.SCHED_OTHER
    pids = process_tree(os.getpid()) if pace == "urgent" else [os.getpid()]
    nice = _URGENT_NICE if pace == "urgent" else 0
    group_nice = _BACKGROUND_NICE if pace == "background" else nice
    for pid in pids:
        _set(pid, policy, nice)
        with contextlib.suppress(OSError):  # it has ended, there are no autogroups, or no CAP_SYS_NICE: see below
            Path(f"/proc/{pid}/autogroup").write_text(str(group_nice))


def _set(pid: int, policy: int, nice: int) -> None:
    """For every thread: in Linux these belong to threads, and new ones inherit them (sched(7)). Without CAP_SYS_NICE
    nothing changes, which costs speed and nothing else."""
    for thread in threads(pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.sched_setscheduler(thread, policy, os.sched_param(0))
            os.setpriority(os.PRIO_PROCESS, thread, nice)
