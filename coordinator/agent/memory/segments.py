"""System V segments in the rounds: whether everybody who can have written to one is asked.

A segment has no descriptor, so only who has it attached can write to it; but any process of the IPC namespace can
attach it, write and detach between two looks. What that leaves is in the segment's row of /proc/sysvipc/shm (proc(5)):
the number of attachments, and the seconds in which one was last made and given up. The kernel writes these for
shmat(2), shmdt(2), fork(2), exit(2), and whenever a mapping is split or moved (ipc/shm.c, __shm_open, shm_close).

A segment is *closed* in a look if the row has as many attachments as the tracked processes have mappings of it, and its
times are some seconds old, so that whatever comes would change them. If the row is the same in the next look, nobody
came, went or forked between the two, and the page tables of the tracked processes have told every write; and of holes
the kernel tells in another way (``holes``). Otherwise the segment counts as written, all of it. Nothing is sent of one
that is not closed: it would be in vain.

CRIU itself attaches every segment, when it dumps the IPC namespace (criu/ipc_ns.c, dump_ipc_shm_seg, 4.2). So the last
row that counts is read before that, and after the tasks are frozen (``at_freeze``). It names a segment's images by its
id, as it names those of anonymous shared memory by the inode's number (criu/shmem.c, do_dump_one_shmem); a service in
which two of these are equal CRIU does not restore (open_shmem).
"""

from __future__ import annotations

import ctypes
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from coordinator.agent.memory.base import ProcessChanges
from coordinator.agent.memory.holes import HoleWatch, holes_are_told
from coordinator.agent.memory.shared_objects import memfd_device

_CLONE_NEWIPC = 0x08000000
_CLOCK_REALTIME_COARSE = 5

#: How old a row's times have to be. Times are whole seconds, so that of what comes in the next instant is up to one
#: older than the clock; the second is for a clock that is set back by less than ``_STEADY_S``, the third to spare.
_SETTLED_S = 3
_STEADY_S = 0.5

#: A smaller segment is sent with the images in less time than it takes to hold CRIU for the last row (0.5 ms).
_LEAST_BYTES = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of one segment: all columns but those that tell how much of it is in memory."""

    columns: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """How large it is."""
        return int(self.columns[3])

    @property
    def attachments(self) -> int:
        """How often it is mapped, by all processes together."""
        return int(self.columns[6])

    @property
    def changed_s(self) -> int:
        """When it was last attached or detached, in seconds of the real-time clock."""
        return max(int(self.columns[11]), int(self.columns[12]))


@dataclass(frozen=True, slots=True)
class Look:
    """The segments of an IPC namespace by their ids, and two clocks as they were directly before."""

    rows: Mapping[int, Row]
    clock_s: float  # the kernel's own for the times of a row
    since_boot_s: float


class Table(Protocol):
    """Where the rows are (``SegmentTable``)."""

    @property
    def device(self) -> str:
        """The device of the mappings of segments, as in /proc/PID/maps."""

    def look(self) -> Look:
        """The rows as they are now. Raises ``OSError``."""

    def watch(self, wanted: Iterable[int], pids: Iterable[int]) -> frozenset[int]:
        """Be told of holes in the wanted segments, as far as the processes have them; return all that this is true
        of."""

    def punched(self) -> frozenset[int]:
        """The segments into which a hole was punched since this was asked last."""

    def close(self) -> None:
        """Let go of the namespace. Idempotent."""


class Segments:
    """The segments of one tree of processes. A look begins with ``untouched`` and ends with ``take``; used by one
    thread at a time."""

    def __init__(self, table: Table | None) -> None:
        """Without a table, no segment is ever closed."""
        self._table = table
        self._now = _NOTHING
        self._frozen: Look | None = None
        self._watched: frozenset[int] = frozenset()
        #: The ids of the segments that were closed in the look before.
        self.closed: frozenset[int] = frozenset()

    def at_freeze(self) -> None:
        """The tasks are frozen, and CRIU has attached nothing yet: what is read now is what the last look goes by."""
        if self._table is not None:
            with suppress(OSError):  # then the last look reads what CRIU has changed
                self._frozen = self._table.look()

    def untouched(self, pids: Iterable[int]) -> frozenset[int]:
        """Begin a look at these processes: the segments whose every change since the look before they will tell."""
        if self._table is None:
            return frozenset()
        before = self._now
        self._now = self._frozen or self._table.look()
        if self._frozen is None:
            worth_it = [each for each, row in self._now.rows.items() if row.attachments and row.bytes >= _LEAST_BYTES]
            self._watched = self._table.watch(worth_it, pids)
        punched = self._table.punched()
        if abs(_shift(self._now) - _shift(before)) > _STEADY_S:
            return frozenset()
        same = (each for each in self.closed if self._now.rows.get(each) == before.rows[each])
        return frozenset(same) - punched

    def take(self, answers: Iterable[ProcessChanges]) -> None:
        """End a look, with what all processes have answered after it began."""
        mapped: Counter[int] = Counter()
        others: set[int] = set()
        for mapping in (mapping for each in answers for mapping in each.changes.mappings):
            if mapping.segment is not None:
                mapped[mapping.segment] += 1
                if self._table is None or mapping.device != self._table.device:
                    others.add(mapping.segment)  # of huge pages, or a file of that name
        settled_s = self._now.clock_s - _SETTLED_S
        self.closed = frozenset(
            each
            for each, row in self._now.rows.items()
            if mapped[each] == row.attachments > 0 and each in self._watched - others and row.changed_s < settled_s
        )

    def close(self) -> None:
        """Let go of the namespace. Idempotent."""
        if self._table is not None:
            self._table.close()


_NOTHING = Look({}, 0.0, 0.0)


def _shift(look: Look) -> float:
    """Changes only where the clock is set."""
    return look.clock_s - look.since_boot_s


def parse_rows(text: str) -> dict[int, Row]:
    """/proc/sysvipc/shm, by id (pure): a head, then key, shmid, perms, size, cpid, lpid, nattch, uid, gid, cuid, cgid,
    atime, dtime, ctime, rss, swap."""
    rows = (line.split() for line in text.splitlines()[1:])
    return {int(columns[1]): Row(tuple(columns[:14])) for columns in rows}


class SegmentTable:
    """/proc/sysvipc/shm of the IPC namespace of a process (see ``Table``): an open one stays that of the namespace in
    which it was opened (ipc/util.c, sysvipc_proc_open). To read it takes some 30 µs."""

    def __init__(self, pid: int) -> None:
        """Raises ``OSError`` where there is no such process or no such table (CONFIG_SYSVIPC), or without
        CAP_SYS_ADMIN."""
        self._holes = HoleWatch()
        with open("/proc/thread-self/ns/ipc", "rb") as home, open(f"/proc/{pid}/ns/ipc", "rb") as there:  # noqa: PTH123
            _enter(there.fileno())
            try:
                self._descriptor = os.open("/proc/sysvipc/shm", os.O_RDONLY | os.O_CLOEXEC)
            finally:
                _enter(home.fileno())
        number = memfd_device()
        self.device = f"{os.major(number):02x}:{os.minor(number):02x}"
        self.watch, self.punched = self._holes.watch, self._holes.punched

    def look(self) -> Look:
        """See ``Table``."""
        clock_s, since_boot_s = time.clock_gettime(_CLOCK_REALTIME_COARSE), time.clock_gettime(time.CLOCK_BOOTTIME)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        chunks = iter(lambda: os.read(self._descriptor, 1 << 16), b"")
        return Look(parse_rows(b"".join(chunks).decode()), clock_s, since_boot_s)

    def close(self) -> None:
        """See ``Table``."""
        self._holes.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def segments_of(pid: int) -> Segments:
    """The segments of the IPC namespace of a process; none where the kernel does not tell all that has to be known."""
    try:
        return Segments(SegmentTable(pid) if holes_are_told() else None)
    except OSError:
        return Segments(None)


def _enter(namespace: int) -> None:
    """Have this thread go to an IPC namespace (setns(2))."""
    if _libc.setns(namespace, _CLONE_NEWIPC):
        raise OSError(ctypes.get_errno(), "entering an IPC namespace")
