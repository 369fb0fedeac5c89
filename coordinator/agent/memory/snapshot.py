"""What a process holds at one moment, found with PAGEMAP_SCAN and without touching it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from coordinator.agent.memory.base import NOT_CLOSED, Backing, Changes, Closed, Mapping
from coordinator.agent.memory.mappings import ADDRESS_LIMIT, read_mappings
from coordinator.agent.memory.pagemap import FILE, PFNZERO, PRESENT, SWAPPED, WPALLOWED, Pagemap, guard_category
from coordinator.agent.memory.ptrace import TargetGone
from coordinator.agent.memory.runs import (
    Spans,
    count_pages,
    difference,
    intersection,
    normalise,
    spans_of,
    to_runs,
    union,
)
from coordinator.agent.memory.shared_objects import DataOfObjects, ObjectState, data_of, look_at
from coordinator.agent.memory.userfault import MemoryReplaced

_TRIES = 3


@dataclass(frozen=True, slots=True)
class Asked:
    """Who can have written to shared memory since the look before, besides the processes that are asked (``Tracker``,
    ``collect``)."""

    others_wrote: bool
    closed: Closed = NOT_CLOSED
    #: Nobody can write now: what has been found out of objects in this look at all processes.
    frozen: DataOfObjects | None = None

    def all(self, mapping: Mapping) -> bool:
        """Whether all are asked who can have written through a mapping of the object."""
        if mapping.segment is not None:
            return mapping.segment in self.closed.segments
        return not self.others_wrote or mapping.memfd in self.closed.compared

    def only_mapped(self, mapping: Mapping) -> bool:
        """Whether nobody has, or had, a descriptor of the object, or what is written through it is found otherwise."""
        closed = mapping.memfd in self.closed.memfds or mapping.memfd in self.closed.compared
        return mapping.anonymous_shared or mapping.segment is not None or closed

    def look_at(self, pid: int, mapping: Mapping) -> ObjectState | None:
        """State of the object under a shared mapping (see ``shared_objects``)."""
        object_ = mapping.shared_object
        if object_ is not None and object_ in self.closed.files:
            return ObjectState(data_of(mapping, self.closed.files[object_]), (0, 0, 0), settled=False, only_mapped=True)
        return look_at(pid, mapping, only_mapped=self.only_mapped(mapping), frozen=self.frozen)


@dataclass(frozen=True, slots=True)
class Held:
    """The pages that hold something, and what is special about some of them."""

    pages: Spans
    exposed: Spans  # in mappings that no userfaultfd watches
    uncertain: Spans  # may have changed without a mark
    unmapped: Spans  # of shared objects, and not in the page table: no mark says whether they were written before
    objects: dict[tuple[int, int], ObjectState]  # by start and end of the mapping


def trackable(mappings: Iterable[Mapping]) -> list[Mapping]:
    """The mappings whose pages are memory: not devices, not what the kernel makes."""
    return [each for each in mappings if each.backing is not Backing.DEVICE and each.end < ADDRESS_LIMIT]


def scan_held(
    pid: int,
    pagemap: Pagemap,
    mappings: list[Mapping],
    before: dict[tuple[int, int], ObjectState],
    asked: Asked,
) -> Held:
    """Look at every page of the mappings (which ``trackable`` chose, by address).

    In a private mapping of a file, a page holds something once it was written to (it is no page of the file any more,
    or is swapped). There a discarded page can look like one that is swapped and was not written (a marker, mm/memory.c,
    pte_install_uffd_wp_if_needed): such pages are uncertain. Such a marker is no page of a shared object either, so
    where the object itself can be asked, only that counts."""
    if not mappings:
        return Held([], [], [], [], {})
    anonymous = [each for each in mappings if each.backing is Backing.ANONYMOUS and not each.shared]
    others = [each for each in mappings if each.backing is not Backing.ANONYMOUS or each.shared]
    own, of_file, swapped = _look_at_files(pagemap, others)
    private = spans_of(each for each in others if not each.shared)
    shared = spans_of(each for each in others if each.shared)
    data, changed, objects = look_at_objects(pid, others, before, asked)
    mapped = intersection(union(own, of_file), shared)
    return Held(
        pages=union(
            _anonymous_pages(pagemap, anonymous),
            intersection(own, private),
            difference(mapped, normalise(objects)),
            data,
        ),
        exposed=scan_exposed(pagemap, mappings),
        uncertain=union(intersection(swapped, private), changed),
        unmapped=difference(data, mapped),
        objects=objects,
    )


def scan_exposed(pagemap: Pagemap, mappings: list[Mapping]) -> Spans:
    """The pages that are there in mappings that no userfaultfd watches. Watched ones are skipped whole, at no cost."""
    if not mappings:
        return []
    return _scan(pagemap, mappings, absent=WPALLOWED | guard_category(), any_of=PRESENT | SWAPPED)


def _anonymous_pages(pagemap: Pagemap, mappings: list[Mapping]) -> Spans:
    """Pages that hold something, as what is left over by the absent and by the zero ones.

    The kernel takes ten times as long for a page it tells as for one it passes over, and a gigabyte in use has far
    fewer gaps than pages. Nor is it asked whether a page is a file's: it would look at each page itself for that."""
    if not mappings:
        return []
    gaps = _scan(pagemap, mappings, absent=PRESENT | SWAPPED)
    empty = _scan(pagemap, mappings, any_of=PFNZERO | guard_category())
    return difference(spans_of(mappings), union(gaps, empty))


def _look_at_files(pagemap: Pagemap, mappings: list[Mapping]) -> tuple[Spans, Spans, Spans]:
    """The pages there are in other mappings: no file's (any more), a file's, and those of the first that are
    swapped."""
    own: Spans = []
    of_file: Spans = []
    swapped: Spans = []
    for first, last in spans_of(mappings):
        for start, end, categories in pagemap.scan(
            first,
            last,
            absent=PFNZERO | guard_category(),
            any_of=PRESENT | SWAPPED,
            tell=FILE | SWAPPED,
        ):
            (of_file if categories & FILE and not categories & SWAPPED else own).append((start, end))
            if categories & SWAPPED:
                swapped.append((start, end))
    return normalise(own), normalise(of_file), normalise(swapped)


def _scan(pagemap: Pagemap, mappings: list[Mapping], *, present: int = 0, absent: int = 0, any_of: int = 0) -> Spans:
    """Pages of all mappings between the first and the last, those of others among them."""
    regions = pagemap.scan(mappings[0].start, mappings[-1].end, present=present, absent=absent, any_of=any_of, tell=0)
    return normalise((start, end) for start, end, _ in regions)


def look_at_objects(
    pid: int, mappings: list[Mapping], before: dict[tuple[int, int], ObjectState], asked: Asked
) -> tuple[Spans, Spans, dict[tuple[int, int], ObjectState]]:
    """Data and changed pages of the shared mappings without a file system below, and their states."""
    data: Spans = []
    changed: Spans = []
    objects: dict[tuple[int, int], ObjectState] = {}
    for mapping in mappings:
        if not mapping.shared or mapping.backing is not Backing.SHMEM or mapping.hugetlb:
            continue
        key = (mapping.start, mapping.end)
        state = asked.look_at(pid, mapping)
        if state is not None:
            objects[key] = state
            data.extend(state.data)
        if state is None or not asked.all(mapping) or not state.same_as(before.get(key)):
            changed.append(key)
    return normalise(data), normalise(changed), objects


def scan_all(pid: int) -> Changes:
    """Everything a process holds, as dirty: for a process that is not tracked. Nothing is done to it."""
    for _ in range(_TRIES):
        mappings = read_mappings(pid)
        if not mappings:
            break
        with Pagemap(pid) as pagemap, suppress(MemoryReplaced):  # by exec, while we looked
            held = scan_held(pid, pagemap, trackable(mappings), {}, Asked(others_wrote=True))
            return Changes(to_runs(held.pages, mappings), (), tuple(mappings), count_pages(held.pages))
    raise TargetGone(f"process {pid} is gone")
