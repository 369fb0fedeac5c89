"""Keeps moves between control groups quick while a restore makes some.

CRIU moves what it restores into its control group before anything else. To move a task the kernel stops all forks and
ends on the host for a moment, and before the first move in a while it makes them look for that: it waits for an RCU
grace period, 10 to 20 ms in which CRIU sleeps and nothing else goes on (kernel/cgroup/cgroup.c,
cgroup_procs_write_start; kernel/locking/percpu-rwsem.c; kernel/rcu/sync.c). When a grace period after the last move has
passed, forks and ends do not look any more. So from the start of CRIU, before the freeze, and until all is restored, we
move ourselves, every few milliseconds, to the group in which we are.

The mount option ``favordynmods`` of control groups does the same for ever (Linux 6.0,
Documentation/admin-guide/cgroup-v2.rst); with it, and on hosts with version 1 alone, this changes nothing.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from coordinator.agent.control_group import group_of_process

#: A grace period takes a tick or two of the kernel's clock, which is 4 ms at 250 Hz.
_EVERY_S = 0.004
_MOST_S = 60.0


class GroupMoves:
    """A thread that moves this process to where it is, again and again, until it is told to ``end``."""

    def __init__(self, group: Path | None) -> None:
        """``group``: that of this process (``group_of_process``); without one there is nothing to do."""
        self._procs = None if group is None else group / "cgroup.procs"
        self._ended = threading.Event()

    @classmethod
    def begun(cls) -> GroupMoves:
        """Moves in this process's group, from now on."""
        moves = cls(group_of_process("self"))
        moves.begin()
        return moves

    def begin(self) -> None:
        """Move from now on, for a minute at most."""
        if self._procs is not None:
            threading.Thread(target=self._move, args=(self._procs,), name="group-moves", daemon=True).start()

    def end(self) -> None:
        """Nobody else moves any more. Idempotent."""
        self._ended.set()

    def _move(self, procs: Path) -> None:
        until = time.monotonic() + _MOST_S
        with suppress(OSError):  # it is merely slower
            descriptor = os.open(procs, os.O_WRONLY | os.O_CLOEXEC)
            try:
                while not self._ended.wait(_EVERY_S) and time.monotonic() < until:
                    os.write(descriptor, b"0")  # who writes it (cgroup-v2.rst, cgroup.procs)
            finally:
                os.close(descriptor)
