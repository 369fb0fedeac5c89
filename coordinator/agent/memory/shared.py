"""Shared memory in the rounds: anonymous shared mappings (MAP_SHARED | MAP_ANONYMOUS) and System V segments.

CRIU has no lazy way for shared memory: it writes every segment into its images while the tasks are frozen, and reads
it back before they run. What can be kept out of the freeze is the sending, which costs most: a segment's pages go over
in the rounds, and of its pages image only those are sent that were written since. The destination puts the rest
together from its store.

Only memory that never has a descriptor is treated so: nobody but who has mapped it can write to it, and CRIU names its
images by its inode (criu/shmem.c), which of a segment is its id. Of a segment it has to be known that all who have
mapped it are asked (``segments``). memfd and files of /dev/shm are sent with the images
(docs/decisions/0014-shared-memory.md).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from coordinator.agent.images import ImageSpace
from coordinator.agent.memory.base import PAGE_BYTES, Mapping, PageRun, ProcessChanges
from coordinator.agent.memory.pagemap_images import PRESENT, parse

_ANONYMOUS_SHARED = "/dev/zero (deleted)"


@dataclass(frozen=True, slots=True)
class SharedRuns:
    """Pages to read at addresses of one process; ``shift`` leads from there to addresses within the object, which the
    store knows by the number ``object`` (below zero, so that it is no pid)."""

    pid: int
    object: int
    runs: tuple[PageRun, ...]
    shift: int


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a pages image: ``offset`` and ``pages`` in the image, and where it is in the object; ``sent`` says
    whether the destination has it."""

    offset: int
    address: int
    pages: int
    sent: bool

    @property
    def bytes(self) -> int:
        """Length in the image."""
        return self.pages * PAGE_BYTES


class SharedMemory:
    """Which pages of which shared objects the destination has. One byte a page."""

    def __init__(self) -> None:
        self._objects: dict[tuple[str, int], int] = {}
        self._sent: dict[int, bytearray] = {}
        self._mapped: dict[tuple[int, int], set[Mapping]] = {}

    def round(self, changed: Iterable[ProcessChanges]) -> Iterator[SharedRuns]:
        """What has to be sent, each page of an object once however many map it; counts as sent from now on."""
        taken: dict[int, bytearray] = {}
        changed = list(changed)
        for each in changed:
            self._forget_lost(each)
        for each in changed:
            for mapping, runs in _shared(each):
                number = self._number(mapping)
                wanted = tuple(self._fresh(taken.setdefault(number, bytearray()), mapping, runs))
                for run in wanted:
                    _mark(self._sent[number], _first(mapping, run), run.pages, 1)
                if wanted:
                    yield SharedRuns(each.pid, number, wanted, mapping.offset - mapping.start)

    def dirty_pages(self, changed: Iterable[ProcessChanges]) -> int:
        """How many pages ``round`` would have sent."""
        taken: dict[int, bytearray] = {}
        return sum(
            run.pages
            for each in changed
            for mapping, runs in _shared(each)
            for run in self._fresh(taken.setdefault(self._number(mapping), bytearray()), mapping, runs)
        )

    def unsent(self, runs: SharedRuns, vanished: Iterable[PageRun]) -> None:
        """These pages could not be read: the images have them."""
        for run in vanished:
            _mark(self._sent[runs.object], (run.start + runs.shift) // PAGE_BYTES, run.pages, 0)

    def outdate(self, changed: Iterable[ProcessChanges]) -> None:
        """These pages changed and are not sent any more: the images have them."""
        for each in changed:
            self._forget_lost(each)
            for mapping, runs in _shared(each):
                for run in runs:
                    _mark(self._sent[self._number(mapping)], _first(mapping, run), run.pages, 0)

    def images(self, space: ImageSpace) -> dict[str, tuple[int, list[Span]]]:
        """By name, the pages images of which the destination has a part: the object's number, and the spans."""
        found: dict[str, tuple[int, list[Span]]] = {}
        sizes = space.sizes() if self._objects else {}
        for (_, inode), number in self._objects.items():
            name = f"pagemap-shmem-{inode}.img"
            if name not in sizes:
                continue
            pages_image, entries = parse(space.read(name, 0, sizes[name]), name)
            offset = 0
            spans: list[Span] = []
            for entry in entries:
                if entry.flags & PRESENT:
                    spans += _cut(self._sent[number], offset, entry.start, entry.pages)
                    offset += entry.pages * PAGE_BYTES
            found[f"pages-{pages_image}.img"] = (number, spans)
        return found

    def _number(self, mapping: Mapping) -> int:
        name = mapping.shared_object
        assert name is not None, "only shared mappings come here"
        number = self._objects.setdefault(name, -len(self._objects) - 1)
        self._sent.setdefault(number, bytearray())
        return number

    @staticmethod
    def _fresh(taken: bytearray, mapping: Mapping, runs: Iterable[PageRun]) -> Iterator[PageRun]:
        """The runs without the pages that were taken from another process in this round."""
        for run in runs:
            first = _first(mapping, run)
            _mark(taken, first + run.pages, 0, 0)
            position = 0
            for is_taken, group in groupby(taken[first : first + run.pages]):
                length = len(list(group))
                if not is_taken:
                    yield PageRun(run.start + position * PAGE_BYTES, length)
                position += length
            _mark(taken, first, run.pages, 1)

    def _forget_lost(self, each: ProcessChanges) -> None:
        """What a process has lost may be there for others, and changed: what we know of it is out of date.

        That is each page it has dropped, and all of an object it has unmapped: what it wrote before, only its page
        table knew. (A process that is gone had its writes told by the others, see ``tree``.) A segment that others may
        write to is lost, too."""
        for mapping, runs in _shared(each, dropped=True):
            for run in runs:
                _mark(self._sent[self._number(mapping)], _first(mapping, run), run.pages, 0)
        mapped = {mapping for mapping in each.changes.mappings if _is_kept(mapping, each)}
        for mapping in self._mapped.get((each.pid, each.started), set()) - mapped:
            self._sent[self._number(mapping)] = bytearray()
        self._mapped[each.pid, each.started] = mapped


def _shared(each: ProcessChanges, *, dropped: bool = False) -> Iterator[tuple[Mapping, tuple[PageRun, ...]]]:
    """The mappings with changed runs that are kept; a run never crosses the end of a mapping."""
    mappings = each.changes.mappings
    starts = [mapping.start for mapping in mappings]
    runs = each.changes.dropped if dropped else each.changes.dirty
    for at, group in groupby(runs, lambda run: bisect.bisect_right(starts, run.start) - 1):
        if at >= 0 and _is_kept(mappings[at], each):
            inside = (run for run in group if run.start < mappings[at].end)
            yield mappings[at], tuple(inside)


def _is_kept(mapping: Mapping, each: ProcessChanges) -> bool:
    if mapping.segment is not None:
        return mapping.segment in each.segments
    return mapping.shared and mapping.name == _ANONYMOUS_SHARED and not mapping.hugetlb


def _first(mapping: Mapping, run: PageRun) -> int:
    return (mapping.offset + run.start - mapping.start) // PAGE_BYTES


def _mark(pages: bytearray, first: int, count: int, value: int) -> None:
    if len(pages) < first + count:
        pages.extend(bytes(first + count - len(pages)))
    pages[first : first + count] = bytes([value]) * count


def _cut(sent: bytearray, offset: int, address: int, pages: int) -> list[Span]:
    """A run of a pages image, cut where pages that were sent end or begin."""
    first = address // PAGE_BYTES
    flags = bytes(sent[first : first + pages]).ljust(pages, b"\0")
    spans, position = [], 0
    for is_sent, group in groupby(flags):
        length = len(list(group))
        shift = position * PAGE_BYTES
        spans.append(Span(offset + shift, address + shift, length, bool(is_sent)))
        position += length
    return spans
