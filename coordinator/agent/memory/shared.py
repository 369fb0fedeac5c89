"""Shared memory in the rounds: anonymous shared mappings, memfds, and System V segments.

CRIU has no lazy way for shared memory: it writes every object into its images while the tasks are frozen, and reads it
back before they run. So its pages go over in the rounds. What CRIU restores as a memfd, which is all but the segments,
it does not even see then (``handing_over``). Of a segment's pages image only those pages are sent that were written
since; the destination puts the rest together from what it has.

Only such memory is treated so of which it is known that all who can write to it are asked (``segments``, ``memfds``,
``tree``), or that is *compared* in the end with what was sent of it (``comparing``); docs/decisions/0014 and 0022.
CRIU names its images of an object by its inode (criu/shmem.c, criu/memfd.c), which of a segment is its id.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from coordinator.agent.images import ImageSpace
from coordinator.agent.memory.base import PAGE_BYTES, Mapping, PageRun, ProcessChanges
from coordinator.agent.memory.pagemap_images import PRESENT, parse
from coordinator.agent.memory.pages import PageData
from coordinator.agent.memory.runs import Spans
from coordinator.agent.memory.sent_digests import SentDigests

#: A smaller object CRIU writes and reads in less time than it takes to hand it over (some 2 ms): 1 MiB.
_LEAST_PAGES = (1 << 20) // PAGE_BYTES


@dataclass(frozen=True, slots=True)
class SharedRuns:
    """Pages to read at addresses of one process, in one mapping of an object, which the destination knows by the number
    ``object`` (below zero, so that it is no pid)."""

    pid: int
    object: int
    runs: tuple[PageRun, ...]
    mapping: Mapping
    digests: SentDigests | None = None

    @property
    def shift(self) -> int:
        """Leads from addresses to offsets within the object."""
        return self.mapping.offset - self.mapping.start

    def note(self, batch: PageData) -> None:
        """What was read of them is sent: to be told of objects that are compared. Three microseconds a page."""
        assert self.digests is not None
        for run, data in batch:
            self.digests.note(run.start + self.shift, data)


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


@dataclass(frozen=True, slots=True)
class Compared:
    """An object that has to be compared with what was sent, and where it can be found: pid and mapping."""

    number: int
    digests: SentDigests
    places: list[tuple[int, Mapping]]


class SharedMemory:
    """Which pages of which shared objects the destination has. One byte a page."""

    def __init__(self) -> None:
        self._objects: dict[tuple[str, int], int] = {}
        self._sent: dict[int, bytearray] = {}
        self._mapped: dict[tuple[int, int], set[Mapping]] = {}
        self._digests: dict[int, SentDigests] = {}

    def round(self, changed: Iterable[ProcessChanges]) -> Iterator[SharedRuns]:
        """What has to be sent, each page of an object once however many map it; counts as sent from now on."""
        taken: dict[int, bytearray] = {}
        changed = list(changed)
        for each in changed:
            self._forget_lost(each)
        for each in changed:
            for mapping, runs in _shared(each):
                number = self.number(mapping)
                wanted = tuple(self._fresh(taken.setdefault(number, bytearray()), mapping, runs))
                for run in wanted:
                    _mark(self._sent[number], _first(mapping, run), run.pages, 1)
                if wanted:
                    yield SharedRuns(each.pid, number, wanted, mapping, self._digests.get(number))

    def dirty_pages(self, changed: Iterable[ProcessChanges]) -> int:
        """How many pages ``round`` would have sent."""
        taken: dict[int, bytearray] = {}
        return sum(
            run.pages
            for each in changed
            for mapping, runs in _shared(each)
            for run in self._fresh(taken.setdefault(self.number(mapping), bytearray()), mapping, runs)
        )

    def unsent(self, runs: SharedRuns, vanished: Iterable[PageRun]) -> None:
        """These pages could not be read: the images have them."""
        for run in vanished:
            _mark(self._sent[runs.object], (run.start + runs.shift) // PAGE_BYTES, run.pages, 0)

    def compared(self) -> list[Compared]:
        """The objects that have to be compared, and where they were mapped in the last round."""
        places: dict[int, list[tuple[int, Mapping]]] = {}
        for (pid, _), mappings in self._mapped.items():
            for mapping in mappings:
                places.setdefault(self.number(mapping), []).append((pid, mapping))
        return [Compared(number, each, places.get(number, [])) for number, each in self._digests.items()]

    def stop(self) -> None:
        """The move is over: comparisons that are under way end soon."""
        for each in list(self._digests.values()):
            each.stop()

    def forget(self, number: int, spans: Spans) -> None:
        """The destination does not have these pages (offsets) as they are: the images have them."""
        for start, end in spans:
            _mark(self._sent[number], start // PAGE_BYTES, (end - start) // PAGE_BYTES, 0)

    def outdate(self, changed: Iterable[ProcessChanges]) -> None:
        """These pages changed and are not sent any more: the images have them."""
        for each in changed:
            self._forget_lost(each)
            for mapping, runs in _shared(each):
                for run in runs:
                    _mark(self._sent[self.number(mapping)], _first(mapping, run), run.pages, 0)

    def number(self, mapping: Mapping) -> int:
        """The number of the object under a mapping."""
        name = mapping.shared_object
        assert name is not None, "only shared mappings come here"
        number = self._objects.setdefault(name, -len(self._objects) - 1)
        self._sent.setdefault(number, bytearray())
        return number

    def sent(self, number: int) -> Spans:
        """What the destination has of an object, as offsets."""
        flags = self._sent[number]
        return [(first * PAGE_BYTES, last * PAGE_BYTES) for first, last, is_sent in _stretches(flags) if is_sent]

    @staticmethod
    def mapped_by(inode: int, answers: Iterable[ProcessChanges]) -> tuple[ProcessChanges, Mapping]:
        """A process that maps an object. Raises ``LookupError`` if none does."""
        for each in answers:
            for mapping in each.changes.mappings:
                if inode == mapping.inode and (mapping.anonymous_shared or mapping.memfd is not None):
                    return each, mapping
        raise LookupError("no process maps it")

    def images(self, space: ImageSpace, hidden: Collection[int] = ()) -> dict[str, tuple[int, list[Span]]]:
        """By name, the pages images of which the destination has a part: the object's number, and the spans. None of
        the objects that were ``hidden`` (inodes): their images are empty."""
        found: dict[str, tuple[int, list[Span]]] = {}
        sizes = space.sizes() if self._objects else {}
        for (_, inode), number in self._objects.items():
            name = f"pagemap-shmem-{inode}.img"
            if not sizes.get(name) or inode in hidden:  # none, or none was written to
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

    @staticmethod
    def _fresh(taken: bytearray, mapping: Mapping, runs: Iterable[PageRun]) -> Iterator[PageRun]:
        """The runs without the pages that were taken from another process in this round."""
        for run in runs:
            first = _first(mapping, run)
            _mark(taken, first + run.pages, 0, 0)
            for begin, end, is_taken in _stretches(taken[first : first + run.pages]):
                if not is_taken:
                    yield PageRun(run.start + begin * PAGE_BYTES, end - begin)
            _mark(taken, first, run.pages, 1)

    def _forget_lost(self, each: ProcessChanges) -> None:
        """What a process has lost may be there for others, and changed: what we know of it is out of date.

        That is each page it has dropped, and all of an object it has unmapped: what it wrote before, only its page
        table knew. (A process that is gone had its writes told by the others, see ``tree``.) A segment that others may
        write to is lost, too."""
        for mapping, runs in _shared(each, dropped=True):
            for run in runs:
                _mark(self._sent[self.number(mapping)], _first(mapping, run), run.pages, 0)
        mapped = {mapping for mapping in each.changes.mappings if _is_kept(mapping, each)}
        for mapping in self._mapped.get((each.pid, each.started), set()) - mapped:
            if (number := self.number(mapping)) not in self._digests:  # else it is compared
                self._sent[number] = bytearray()
        self._mapped[each.pid, each.started] = mapped
        for mapping in mapped:  # what was sent before differs from then on, because there is no digest of it
            if mapping.memfd in each.closed.compared:
                self._digests.setdefault(self.number(mapping), SentDigests())


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
        return mapping.segment in each.closed.segments
    if mapping.memfd is not None:
        return mapping.memfd in each.closed.memfds or mapping.memfd in each.closed.compared
    return mapping.anonymous_shared


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
    return [
        Span(offset + begin * PAGE_BYTES, address + begin * PAGE_BYTES, end - begin, is_sent)
        for begin, end, is_sent in _stretches(flags)
    ]


def _stretches(flags: bytes | bytearray) -> Iterator[tuple[int, int, bool]]:
    """Where bytes of 0 and of 1 begin and end, and whether they are 1."""
    begin = 0
    while begin < len(flags):
        is_set = bool(flags[begin])
        end = flags.find(0 if is_set else 1, begin)
        end = len(flags) if end < 0 else end
        yield begin, end, is_set
        begin = end


def worth_hiding(changed: Iterable[ProcessChanges]) -> dict[int, int]:
    """The objects that CRIU need not see, as all who can write to them are asked: inode → pages that its mappings have
    room for, the largest of them. A segment is none: CRIU restores it into memory that it has from the kernel."""
    found: dict[int, int] = {}
    for each in changed:
        for mapping in each.changes.mappings:
            if mapping.segment is None and _is_kept(mapping, each):
                pages = (mapping.end - mapping.start) // PAGE_BYTES
                found[mapping.inode] = max(pages, found.get(mapping.inode, 0))
    return {inode: pages for inode, pages in found.items() if pages >= _LEAST_PAGES}
