"""The tracker of choice: userfaultfd asynchronous write-protection and PAGEMAP_SCAN (Linux ≥ 6.7).

The target is stopped once, for the one system call that makes the userfaultfd. From then on a write to a protected page
costs it one page fault without a stop, and asking costs it nothing.

Why no change is lost, for a page in a mapping that

- *is registered*: the mark "not written" lies in its page table entry. Every write clears it, and a page that is new
  (first use, after MADV_DONTNEED, after being read back) has none, except in mappings of files (see ``snapshot``).
  Swapping and migration keep the mark, and merging (KSM) may lose it, which makes a page dirty. A scan takes the mark's
  absence and sets it in one step under the page table's lock.
- *is not registered* (made by mmap, brk, mremap or exec since the last round, or refused): all its pages are dirty. The
  kernel tells these (no WPALLOWED), not the list of mappings: munmap and mmap at the same address look alike in maps.
- *can never be written by this process* (a shared object opened for reading; the kernel refuses to register it):
  changed only by those who can, who are asked themselves.
- *belongs to a userfaultfd of the target's own*: always dirty, and its marks are left alone.
- *becomes one that CRIU leaves to its daemon* (munlock): dirty as a whole, for an asker may keep only such pages.
- *is shared*: see ``shared_objects``. Every process that maps an object marks for itself: unite the answers of all. Of
  those that have gone, ``tree`` tells (``others_wrote``).

The kernel's WP_UNPOPULATED feature has to be on for scanning, but private pages that are not there are never marked: so
no page tables are filled for the large reservations of Go, Java or sanitizers. A page of a shared object that is there
and not in the page table is marked, however: it may have been written, and its entry dropped with what it told (by
reclaim, or MADV_DONTNEED); an entry dropped with its mark leaves the mark behind.
"""

from __future__ import annotations

import errno
import os

from coordinator.agent.memory.base import Changes, Mapping
from coordinator.agent.memory.mappings import read_mappings
from coordinator.agent.memory.pagemap import PFNZERO, PRESENT, SWAPPED, WRITTEN, Pagemap, guard_category
from coordinator.agent.memory.ptrace import TargetGone
from coordinator.agent.memory.runs import (
    Spans,
    count_pages,
    difference,
    intersection,
    normalise,
    plain_runs,
    spans_of,
    to_runs,
    union,
)
from coordinator.agent.memory.shared_objects import ObjectState
from coordinator.agent.memory.snapshot import Held, scan_exposed, scan_held, trackable
from coordinator.agent.memory.userfault import MemoryReplaced, mark, register, register_clean, take_userfaultfd

_REATTACHMENTS = 3


class WriteProtectTracker:
    """Tracks one process (see ``Tracker``). Making one stops one thread of it for some hundred microseconds."""

    def __init__(self, pid: int) -> None:
        """Raises ``TargetGone``, or ``TrackingFailed`` if the process cannot be tracked; it is left as found then."""
        self._pid = pid
        self._userfaultfd = take_userfaultfd(pid)
        self._known: Spans = []
        self._lazy: Spans = []
        self._registered: Spans = []
        self._unwatched: Spans = []
        self._read_only: Spans = []
        self._objects: dict[tuple[int, int], ObjectState] = {}

    @property
    def pid(self) -> int:
        """See ``Tracker``."""
        return self._pid

    def close(self) -> None:
        """See ``Tracker``: the registrations and marks go with the descriptor."""
        if self._userfaultfd >= 0:
            os.close(self._userfaultfd)
            self._userfaultfd = -1

    def collect(self, *, last: bool = False, others_wrote: bool = False) -> Changes:
        """See ``Tracker``."""
        if others_wrote:
            self._objects = {}
        for _ in range(_REATTACHMENTS):
            try:
                return self._collect(last)
            except MemoryReplaced:
                self._attach_again()
        raise TargetGone(f"process {self._pid} keeps executing other programs")

    def _attach_again(self) -> None:
        """After exec the process has a new memory; what is known of the old is not forgotten, so that it is dropped."""
        fresh = take_userfaultfd(self._pid)
        self.close()
        self._userfaultfd = fresh
        self._registered, self._unwatched, self._objects = [], [], {}

    def _collect(self, last: bool) -> Changes:
        mappings = read_mappings(self._pid)
        if not mappings:
            raise TargetGone(f"process {self._pid} is gone")
        memory = trackable(mappings)
        with Pagemap(self._pid) as pagemap:
            added: Spans = []
            if last:  # what is new is dirty as a whole, and nothing is to be tracked any more
                self._registered, self._read_only = intersection(self._registered, spans_of(memory)), []
            else:
                added = self._register_new(pagemap, mappings, memory)
            written = self._take_written(pagemap, protect=not last)
            held = scan_held(self._pid, pagemap, memory, self._objects)
        if not last:
            for start, end in intersection(held.unmapped, self._registered):
                mark(self._userfaultfd, start, end)
        if added and _all_exposed(added, held):
            raise MemoryReplaced  # the kernel took our registrations, for a memory that is not this process's
        return self._answer(mappings, written, held)

    def _answer(self, mappings: list[Mapping], written: Spans, held: Held) -> Changes:
        self._unwatched = difference(held.pages, self._registered)
        unmarked = union(held.exposed, held.unmapped, self._unwatched)
        suspects = union(written, difference(unmarked, self._read_only), held.uncertain)
        lazy = spans_of(each for each in mappings if each.lazy)
        suspects = union(suspects, difference(lazy, self._lazy))
        dirty = union(intersection(held.pages, suspects), difference(held.pages, self._known))
        dropped = difference(self._known, held.pages)
        self._known, self._objects, self._lazy = held.pages, held.objects, lazy
        return Changes(to_runs(dirty, mappings), plain_runs(dropped), tuple(mappings), count_pages(held.pages))

    def _register_new(self, pagemap: Pagemap, mappings: list[Mapping], memory: list[Mapping]) -> Spans:
        """Register those of ``memory`` that hold pages and are not registered; return those that the kernel took.

        A shared one may hold pages that are not in the page table. One that has grown in place is registered already in
        part, and keeps its marks."""
        if not memory:
            return []
        self._registered = intersection(self._registered, spans_of(memory))
        exposed = scan_exposed(pagemap, memory)
        missing = difference(spans_of(memory), self._registered)
        grown = spans_of(_touching(_touching(memory, self._registered), missing))
        shared = intersection(missing, spans_of(each for each in memory if each.shared))
        added: Spans = []
        read_only: Spans = []
        rooms = rooms_of(mappings)
        for mapping in _touching(memory, union(exposed, self._unwatched, grown, shared)):
            new = bool(intersection([(mapping.start, mapping.end)], exposed))
            refusal = self._register(mapping, rooms[mapping.start], new)
            if not refusal:
                added.append((mapping.start, mapping.end))
            elif refusal == errno.EPERM and mapping.shared:
                read_only.append((mapping.start, mapping.end))
        self._read_only = normalise(read_only)
        self._registered = union(self._registered, normalise(added))
        return normalise(added)

    def _register(self, mapping: Mapping, room: tuple[int, int], new: bool) -> int:
        """Register a mapping with the room it has to grow into.

        The process runs, and its mapping may have grown since we read of it. If our range ended inside it, the kernel
        would split it there, and mremap(2) refuses (EFAULT) to resize what is more than one mapping. Huge pages want
        a range that is aligned to their size, which the room may not be: they do not grow."""
        take = register_clean if new else register
        refusal = take(self._userfaultfd, *room)
        return take(self._userfaultfd, mapping.start, mapping.end) if refusal == errno.EINVAL else refusal

    def _take_written(self, pagemap: Pagemap, protect: bool) -> Spans:
        """The pages written since they were marked; with ``protect`` they are marked again in the same step."""
        found: list[tuple[int, int]] = []
        for start, end in self._registered:
            found.extend(
                (first, last)
                for first, last, _ in pagemap.scan(
                    start,
                    end,
                    present=WRITTEN,
                    absent=PFNZERO | guard_category(),
                    any_of=PRESENT | SWAPPED,
                    protect=protect,
                )
            )
        return normalise(found)


def rooms_of(mappings: list[Mapping]) -> dict[int, tuple[int, int]]:
    """By its start, each mapping with the free addresses on both its sides, up to its neighbours (pure)."""
    ends = [mapping.end for mapping in mappings]
    starts = [mapping.start for mapping in mappings]
    below = [*starts[:1], *ends[:-1]]
    above = [*starts[1:], *ends[-1:]]
    return dict(zip(starts, zip(below, above, strict=True), strict=True))


def _touching(mappings: list[Mapping], spans: Spans) -> list[Mapping]:
    """The mappings with at least one page of the spans; both are sorted."""
    found: list[Mapping] = []
    i = 0
    for mapping in mappings:
        while i < len(spans) and spans[i][1] <= mapping.start:
            i += 1
        if i < len(spans) and spans[i][0] < mapping.end:
            found.append(mapping)
    return found


def _all_exposed(added: Spans, held: Held) -> bool:
    pages = intersection(held.pages, added)
    return bool(pages) and not difference(pages, held.exposed)
