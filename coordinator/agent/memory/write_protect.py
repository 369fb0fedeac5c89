"""The tracker of choice: userfaultfd asynchronous write-protection and PAGEMAP_SCAN (Linux ≥ 6.7, with what
mremap(2) does to marks since 6.13 and 6.12.10: see ``choose``).

The target is stopped once, for the one system call that makes the userfaultfd. From then on a write to a protected page
costs it one page fault without a stop, and asking costs it nothing.

Why no change is lost, for a page in a mapping that

- *is registered*: the mark "not written" lies in its page table entry. Every write clears it, and a page that is new
  (first use, after MADV_DONTNEED, after being read back, after mremap) has none, except in mappings of files (see
  ``snapshot``).
  Swapping and migration keep the mark, and merging (KSM) may lose it, which makes a page dirty. A scan takes the mark's
  absence and sets it in one step under the page table's lock.
- *is not registered* (made by mmap, brk, mremap or exec since the last round, or refused): all its pages are dirty. The
  kernel tells these (no WPALLOWED), not the list of mappings: munmap and mmap at the same address look alike in maps.
  Marks that are left there are no marks (see ``registration``).
- *can never be written by this process* (a shared object opened for reading; the kernel refuses to register it):
  changed only by those who can, who are asked themselves.
- *belongs to a userfaultfd of the target's own*: always dirty, and its marks are left alone.
- *becomes one that CRIU leaves to its daemon* (munlock): dirty as a whole, for an asker may keep only such pages.
- *is shared*: see ``shared_objects``. Every process that maps an object marks for itself: unite the answers of all. Of
  those that have gone, ``tree`` tells (``others_wrote``, ``closed``).

The kernel's WP_UNPOPULATED feature has to be on for scanning, but private pages that are not there are never marked: so
no page tables are filled for the large reservations of Go, Java or sanitizers. A page of a shared object that is there
and not in the page table is marked, however: it may have been written, and its entry dropped with what it told (by
reclaim, or MADV_DONTNEED); an entry dropped with its mark leaves the mark behind.
"""

from __future__ import annotations

import os

from coordinator.agent.memory.base import NOT_CLOSED, Changes, Closed, Mapping
from coordinator.agent.memory.mappings import read_mappings
from coordinator.agent.memory.pagemap import PFNZERO, PRESENT, SWAPPED, WRITTEN, Pagemap, guard_category
from coordinator.agent.memory.ptrace import TargetGone
from coordinator.agent.memory.registration import Registration
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
from coordinator.agent.memory.shared_objects import DataOfObjects, ObjectState
from coordinator.agent.memory.snapshot import Asked, Held, scan_exposed, scan_held, trackable
from coordinator.agent.memory.userfault import MemoryReplaced, mark, take_userfaultfd

_REATTACHMENTS = 3


class WriteProtectTracker:
    """Tracks one process (see ``Tracker``). Making one stops one thread of it for some hundred microseconds."""

    def __init__(self, pid: int) -> None:
        """Raises ``TargetGone``, or ``TrackingFailed`` if the process cannot be tracked; it is left as found then."""
        self._pid = pid
        self._userfaultfd = take_userfaultfd(pid)
        self._known: Spans = []
        self._lazy: Spans = []
        self._registration = Registration(pid, self._userfaultfd)
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

    def collect(
        self,
        *,
        last: bool = False,
        others_wrote: bool = False,
        closed: Closed = NOT_CLOSED,
        frozen: DataOfObjects | None = None,
    ) -> Changes:
        """See ``Tracker``."""
        asked = Asked(others_wrote=others_wrote, closed=closed, frozen=frozen)
        for _ in range(_REATTACHMENTS):
            try:
                return self._collect(last, asked)
            except MemoryReplaced:
                self._attach_again()
        raise TargetGone(f"process {self._pid} keeps executing other programs")

    def _attach_again(self) -> None:
        """After exec the process has a new memory; what is known of the old is not forgotten, so that it is dropped."""
        fresh = take_userfaultfd(self._pid)
        self.close()
        self._userfaultfd = fresh
        self._registration, self._objects = Registration(self._pid, fresh), {}

    def _collect(self, last: bool, asked: Asked) -> Changes:
        mappings = read_mappings(self._pid)
        if not mappings:
            raise TargetGone(f"process {self._pid} is gone")
        memory = trackable(mappings)
        with Pagemap(self._pid) as pagemap:
            added = False
            if last:  # what is new is dirty as a whole, and nothing is to be tracked any more
                self._registration.keep_last(pagemap, memory)
            else:
                added = self._register_new(pagemap, mappings, memory)
            written = self._take_written(pagemap, protect=not last)
            held = scan_held(self._pid, pagemap, memory, self._objects, asked)
        if not last:
            for start, end in intersection(held.unmapped, self._registration.registered):
                mark(self._userfaultfd, start, end)
        if added and _all_exposed(self._registration.registered, held):
            raise MemoryReplaced  # the kernel took our registrations, for a memory that is not this process's
        return self._answer(mappings, written, held, last)

    def _answer(self, mappings: list[Mapping], written: Spans, held: Held, last: bool) -> Changes:
        unwatched = difference(held.pages, self._registration.registered)
        unmarked = union(held.exposed, held.unmapped, unwatched)
        read_only = self._registration.read_only
        suspects = union(written, difference(unmarked, read_only), held.uncertain)
        lazy = spans_of(each for each in mappings if each.lazy)
        suspects = union(suspects, difference(lazy, self._lazy))
        dirty = union(intersection(held.pages, suspects), difference(held.pages, self._known))
        dropped = difference(self._known, held.pages)
        unwatched_pages = count_pages(intersection(intersection(dirty, unmarked), self._known)) if last else 0
        self._known, self._objects, self._lazy = held.pages, held.objects, lazy
        known_pages = count_pages(held.pages)
        return Changes(to_runs(dirty, mappings), plain_runs(dropped), tuple(mappings), known_pages, unwatched_pages)

    def _register_new(self, pagemap: Pagemap, mappings: list[Mapping], memory: list[Mapping]) -> bool:
        """Register what is new of ``memory``; whether there was any."""
        self._registration.keep(memory)
        missing = difference(spans_of(memory), self._registration.registered)
        if not missing and not scan_exposed(pagemap, memory):
            return False
        self._registration.extend(pagemap, mappings, memory)
        return True

    def _take_written(self, pagemap: Pagemap, protect: bool) -> Spans:
        """The pages written since they were marked; with ``protect`` they are marked again in the same step."""
        found: list[tuple[int, int]] = []
        for start, end in self._registration.registered:
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


def _all_exposed(added: Spans, held: Held) -> bool:
    pages = intersection(held.pages, added)
    return bool(pages) and not difference(pages, held.exposed)
