"""Contracts of memory tracking: what a tracker answers, in what units, and what it promises.

Addresses are virtual addresses of the process, in bytes and page aligned; amounts are pages of ``PAGE_BYTES``.

The one rule everything here keeps: **unknown means dirty, never clean**. A page is left out of an answer only if it
provably holds, since the previous answer, what it held then. Writes that no page table sees are outside of that: a
device that writes into pinned memory (O_DIRECT, RDMA, io_uring) after a round.

``Changes.dirty`` and ``Changes.dropped`` never overlap. Whoever keeps the pages applies both: forget the dropped ones
(they read as zero now, or as the file below them), fetch the dirty ones. After that the keeper has every page that
holds something. A page nobody ever named is zero, or is what the mapped file has.
"""

from __future__ import annotations

import os
import typing
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

#: Size of a page in bytes on this host.
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True, order=True)
class PageRun:
    """``pages`` consecutive pages from the page-aligned address ``start``."""

    start: int
    pages: int

    @property
    def end(self) -> int:
        """Address of the first byte after the run."""
        return self.start + self.pages * PAGE_BYTES


class Backing(StrEnum):
    """What lies under a mapping."""

    ANONYMOUS = "anonymous"  # private memory without a file
    SHMEM = "shmem"  # shared anonymous memory, memfd, SysV segment, or a file of a tmpfs
    FILE = "file"  # a file of any other file system
    DEVICE = "device"  # memory of a device, or a mapping the kernel makes (vdso, vvar, vsyscall, AIO ring)


@dataclass(frozen=True, slots=True)
class Mapping:
    """One mapping of a process (a line of /proc/PID/maps), with what decides how its pages have to be moved."""

    start: int
    end: int
    permissions: str  # as in maps: "rw-p"
    backing: Backing
    offset: int  # bytes into the object
    device: str  # "major:minor" in hexadecimal, as in maps
    inode: int
    name: str  # path or "[heap]", may be empty
    locked: bool = False
    hugetlb: bool = False
    growsdown: bool = False

    @property
    def shared(self) -> bool:
        """Whether other processes that map the same object see what is written here."""
        return self.permissions.endswith("s")

    @property
    def lazy(self) -> bool:
        """Whether CRIU leaves the pages of this mapping to a filler (criu/include/vma.h,
        vma_entry_can_be_lazy): private anonymous memory, neither locked nor of huge pages.

        The stack is lazy too: criu/mem.c, is_stack, compares only offsets within a page, so that one thread whose stack
        pointer is page aligned makes *every* page of its process not lazy, and otherwise none is excepted. So this is
        a forecast: keep the pages of every private anonymous mapping, and let the images decide what is asked for."""
        return self.backing is Backing.ANONYMOUS and not self.shared and not self.locked and not self.hugetlb

    @property
    def shared_object(self) -> tuple[str, int] | None:
        """Names the object under a shared mapping (device, inode), equal in every process that maps it; else None."""
        return (self.device, self.inode) if self.shared else None

    @property
    def segment(self) -> int | None:
        """The id of the System V segment that is mapped, which is its inode (ipc/shm.c, newseg); else None."""
        return self.inode if self.shared and self.name.startswith("/SYSV") else None

    @property
    def memfd(self) -> int | None:
        """The inode of the memfd that is mapped and shared; else None. What was anonymous shared memory is one after a
        restore (criu/proc_parse.c, handle_vma), without a descriptor."""
        return self.inode if self.shared and self.name.startswith("/memfd:") and not self.hugetlb else None

    @property
    def anonymous_shared(self) -> bool:
        """Whether it is of MAP_SHARED | MAP_ANONYMOUS (mm/shmem.c, shmem_zero_setup)."""
        return self.shared and self.name == "/dev/zero (deleted)" and not self.hugetlb


#: What files hold, by device (as in maps) and inode.
HeldFiles = typing.Mapping[tuple[str, int], list[tuple[int, int]]]
NO_FILES: HeldFiles = {}


@dataclass(frozen=True, slots=True)
class Closed:
    """The shared objects that nobody can have written to but through a mapping of a process that is asked: System V
    segments by id, memfds by inode. (The two may be equal numbers.) ``compared``: memfds that have a descriptor. What
    was written through that is found by comparing (``comparing``), and page tables tell the rest. ``files``: of these
    files of a tmpfs (device and inode) somebody else finds out what changed past the page tables, and what they hold,
    as spans of offsets: they must not be opened, because that is told."""

    segments: frozenset[int] = frozenset()
    memfds: frozenset[int] = frozenset()
    compared: frozenset[int] = frozenset()
    files: HeldFiles = field(default_factory=dict)


NOT_CLOSED = Closed()


@dataclass(frozen=True, slots=True)
class Changes:
    """What a tracker found in one process since it was asked last. Runs are sorted, disjoint and merged."""

    dirty: tuple[PageRun, ...]  # hold something that the asker may not have
    dropped: tuple[PageRun, ...]  # were named dirty once and now hold nothing (absent or zero): forget them
    mappings: tuple[Mapping, ...]  # all mappings, by address; a run never crosses the end of a mapping
    known_pages: int  # pages the asker has after applying this answer
    #: Of ``dirty``: the asker has them, and nothing told whether they were written to since. Counted in the last look.
    unwatched_pages: int = 0

    @property
    def dirty_pages(self) -> int:
        """Number of pages in ``dirty``."""
        return sum(run.pages for run in self.dirty)


class Tracker(Protocol):
    """One process: which pages changed since I last asked.

    Whoever makes a tracker closes it; a tracker is used by one thread at a time. All calls block: up to some
    milliseconds a gigabyte, so run them in a worker thread.
    """

    @property
    def pid(self) -> int:
        """The tracked process, as numbered in our pid namespace."""
        ...

    def collect(
        self,
        *,
        last: bool = False,
        others_wrote: bool = False,
        closed: Closed = NOT_CLOSED,
        frozen: dict[tuple[int, int], list[tuple[int, int]]] | None = None,
    ) -> Changes:
        """First call: every page that holds something. Later calls: those that changed since the call before.

        Each change is in this answer or in the next one, never in none: a page is armed again in the instant it is
        read as changed, and its content is to be read after the answer. With the process frozen throughout, an
        answer is exact. ``last``: it is frozen and is not asked again, so nothing is armed. ``others_wrote``:
        a process that cannot be asked any more may have written to shared memory, all of which is dirty then, but for
        System V segments. These are dirty unless they are ``closed``. Of a memfd that is, page tables tell all; of one
        that is compared, all that its asker does not find himself; of another only its times tell. ``frozen``: all who
        are asked in this look stand still; what is found out of shared objects is kept here for the next of them.

        Raises ``TargetGone`` if the process ended, ``TrackingFailed`` if it can be tracked no longer."""
        ...

    def close(self) -> None:
        """Remove every trace from the process: no descriptor, no registration is left. Idempotent; works on a process
        that is gone or frozen. May take tens of milliseconds a gigabyte, in which the process cannot fault pages in:
        not within the freeze. CRIU does not mind the registrations (criu/proc_parse.c ignores their flags)."""
        ...


@dataclass(frozen=True, slots=True)
class ProcessChanges:
    """The changes of one process of a tree."""

    pid: int  # in our pid namespace
    inner_pid: int  # in its innermost pid namespace (last number of NSpid): the pid in CRIU's images
    started: int  # start time, clock ticks since boot: with the pid it names the process for ever
    fresh: bool  # everything it holds is in this answer: forget all that was kept for this pid before
    changes: Changes
    untracked: str | None = None  # why it cannot be tracked, so that every answer about it is ``fresh``
    #: Equal in all answers of a look.
    closed: Closed = NOT_CLOSED
    #: Whether somebody may have written to shared memory since the look before who is not asked any more. Equal in all
    #: answers of a look.
    others_wrote: bool = False
