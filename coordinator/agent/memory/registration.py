"""Which mappings of a running process its userfaultfd watches.

The process runs, so what we read of its mappings is old when we register them. The kernel splits a mapping in which the
range begins or ends, and mremap(2) refuses (EFAULT) to resize or move what is more than one mapping: realloc(3) of a
service would find no memory. So a range ends only where no mapping can come to lie across its end: one range reaches
over everything from one *obstacle* to the next, the free addresses and what is already registered among it.

Obstacles are mappings the kernel refuses (fs/userfaultfd.c, userfaultfd_register): what it has made itself, which
nobody takes away, devices, what can never be written, droppable memory, and what belongs to a userfaultfd of the
process's own. A single one refuses the whole range. Where that happens smaps tells which it is.

A mapping can lose its registration and keep its marks: mremap(2) that makes one mapping of what it moves and of what
lies beside it takes the userfaultfd from both, and the marks only from what it moves (mm/mremap.c, copy_vma_and_data;
fs/userfaultfd.c, mremap_userfaultfd_prep). Such a *stale* mark does not notice a write, and would say of a page that is
registered anew that it was never written. So marks where nothing is registered are looked for directly before
registering, and taken away directly after: those pages are dirty.

Left, both within the microseconds between reading or looking and registering: an obstacle that is taken away, with a
mapping made across its end and resized (the next round makes one mapping of that again); and a mapping that loses its
registration, and is written.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path

from coordinator.agent.memory.base import Backing, Mapping
from coordinator.agent.memory.mappings import ADDRESS_LIMIT, read_flags
from coordinator.agent.memory.pagemap import PRESENT, SWAPPED, WPALLOWED, WRITTEN, Pagemap, guard_category
from coordinator.agent.memory.runs import Span, Spans, difference, intersection, normalise, spans_of, touching, union
from coordinator.agent.memory.userfault import register, unmark

_LEAST_ADDRESS = Path("/proc/sys/vm/mmap_min_addr")
_DEFAULT_LEAST_ADDRESS = 1 << 16
#: VmFlags (Documentation/filesystems/proc.rst) of memory that has a userfaultfd.
_WATCHED = frozenset({"um", "uw", "ui"})


class Registration:
    """The registrations of one userfaultfd in one memory."""

    def __init__(self, pid: int, userfaultfd: int) -> None:
        self.registered: Spans = []  # of what the last ``extend`` or ``keep`` was told of
        self.read_only: Spans = []  # shared, and the process can never write there
        self._pid = pid
        self._userfaultfd = userfaultfd
        self._refused: frozenset[Mapping] = frozenset()

    def keep(self, memory: list[Mapping]) -> None:
        """Forget what is no memory any more, and what was found to be read-only: it may be another mapping now."""
        self.registered = intersection(self.registered, spans_of(memory))
        self.read_only = []

    def keep_last(self, pagemap: Pagemap, memory: list[Mapping]) -> None:
        """As ``keep``, for a process that is frozen: what is read-only is asked for once more, and nothing is new."""
        self.keep(memory)
        self._refused &= frozenset(memory)
        self.read_only = self._never_writable(pagemap)

    def extend(self, pagemap: Pagemap, mappings: list[Mapping], memory: list[Mapping]) -> None:
        """Register ``memory``, which is a part of all ``mappings``, both by address.

        What the kernel does not take is not in ``registered``. Raises ``MemoryReplaced``."""
        self.keep(memory)
        outside = [each for each in mappings if each.backing is Backing.DEVICE]
        wanted = spans_of(memory)
        for span in stretches(mappings, outside):
            if intersection([span], wanted):
                refusal = self._register(pagemap, span)
                taken = self._parts_of(pagemap, span, mappings, outside) if refusal else [span]
                self.registered = union(self.registered, intersection(taken, wanted))
        self.read_only = self._never_writable(pagemap)

    def _register(self, pagemap: Pagemap, span: Span) -> int:
        """As ``userfault.register``; stale marks in the range are taken off."""
        present, gone = PRESENT | SWAPPED, WPALLOWED | WRITTEN | guard_category()
        stale = [(start, end) for start, end, _ in pagemap.scan(*span, absent=gone, any_of=present)]
        refusal = register(self._userfaultfd, *span)
        for start, end in stale if not refusal else ():
            unmark(self._userfaultfd, start, end)
        return refusal

    def _parts_of(self, pagemap: Pagemap, refused: Span, mappings: list[Mapping], outside: list[Mapping]) -> Spans:
        """Register what the kernel takes of a range that it refuses as a whole; return that.

        First with what it refused the last time, and asked anew if that is not all. What is refused then is tried one
        by one: huge pages want a range that begins and ends where theirs do, but cannot grow."""
        self._refused &= frozenset(mappings)
        taken: Spans = []
        for ask in (False, True):
            if ask:
                self._refused |= self._find_refused(mappings, ours=union(self.registered, taken))
            parts = intersection(stretches(mappings, [*outside, *self._refused]), [refused])
            taken = union(taken, self._register_each(pagemap, difference(parts, taken)))
            if not (rest := difference(parts, taken)):
                return taken
        alone = [(each.start, each.end) for each in touching(mappings, rest)]
        return union(taken, self._register_each(pagemap, alone))

    def _register_each(self, pagemap: Pagemap, spans: Iterable[Span]) -> Spans:
        return normalise(span for span in spans if not self._register(pagemap, span))

    def _find_refused(self, mappings: list[Mapping], ours: Spans) -> frozenset[Mapping]:
        """What the kernel will refuse, told by smaps. ``ours``: where the userfaultfd that smaps tells of is this."""
        flags = read_flags(self._pid)
        found = set()
        for mapping in mappings:
            span = (mapping.start, mapping.end)
            has = flags.get(span, frozenset({"mw"}))
            others = has & _WATCHED and not intersection([span], ours)
            if "mw" not in has or "dp" in has or others:
                found.add(mapping)
        return frozenset(found)

    def _never_writable(self, pagemap: Pagemap) -> Spans:
        """Asked of the kernel in every round: another mapping of the same file could have taken the place."""
        shared = [(each.start, each.end) for each in self._refused if each.shared]
        return normalise(span for span in shared if self._register(pagemap, span) == errno.EPERM)


def stretches(mappings: list[Mapping], obstacles: Iterable[Mapping]) -> Spans:
    """All addresses from the lowest to the last mapping's end, without the obstacles."""
    ends = [each.end for each in mappings if each.end < ADDRESS_LIMIT]
    return difference([(least_address(), max(ends))], spans_of(obstacles)) if ends else []


def least_address() -> int:
    """The lowest address that can be registered, in bytes (Documentation/admin-guide/sysctl/vm.rst)."""
    return max(int(_LEAST_ADDRESS.read_text()), _DEFAULT_LEAST_ADDRESS)
