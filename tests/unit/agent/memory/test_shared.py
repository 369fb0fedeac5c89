"""Shared objects in the rounds: each page once, nothing out of date, and the image put together byte for byte."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.agent.images import ImageHold
from coordinator.agent.memory.base import (
    NOT_CLOSED,
    PAGE_BYTES,
    Backing,
    Changes,
    Closed,
    Mapping,
    PageRun,
    ProcessChanges,
)
from coordinator.agent.memory.pagemap_images import PRESENT, Entry
from coordinator.agent.memory.shared import SharedMemory, SharedRuns
from tests.unit.agent.memory.pagemaps import serialize

SIZE = 24
INODE = 77
#: Where two processes map the object: the second only a part of it.
PLACES = {10: (0x10000, 0, SIZE), 11: (0x900000, 4, SIZE - 4)}


def changes(pid: int, dirty: set[int], dropped: set[int]) -> ProcessChanges:
    """The changes of a process in pages of the object, where it maps them."""
    start, first, pages = PLACES[pid]
    shared = Mapping(
        start,
        start + pages * PAGE_BYTES,
        "rw-s",
        Backing.SHMEM,
        first * PAGE_BYTES,
        "00:01",
        INODE,
        "/dev/zero (deleted)",
    )
    private = Mapping(0x1000, 0x3000, "rw-p", Backing.ANONYMOUS, 0, "00:00", 0, "")

    def runs(numbers: set[int]) -> tuple[PageRun, ...]:
        inside = sorted(number for number in numbers if first <= number < first + pages)
        return tuple(PageRun(start + (number - first) * PAGE_BYTES, 1) for number in inside)

    found = Changes((PageRun(0x1000, 2), *runs(dirty)), runs(dropped), (private, shared), 0)
    return ProcessChanges(pid, pid, 1, False, found)


class Images:
    """An image space with what CRIU writes of a shared object: all its pages that hold something."""

    images = work = Path("/nowhere")

    def __init__(self, content: dict[int, bytes]) -> None:
        entries = [Entry(number * PAGE_BYTES, 1, PRESENT) for number in sorted(content)]
        pages = b"".join(content[number] for number in sorted(content))
        self.files = {f"pagemap-shmem-{INODE}.img": serialize(5, entries), "pages-5.img": pages}

    async def create(self, size_bytes: int) -> None:
        raise NotImplementedError

    async def remove(self) -> None:
        raise NotImplementedError

    def hold(self) -> ImageHold:
        raise NotImplementedError

    @property
    def written(self) -> dict[str, int]:
        raise NotImplementedError

    def names(self) -> set[str]:
        return set(self.files)

    def sizes(self, but: Container[str] = ()) -> dict[str, int]:
        return {name: len(content) for name, content in self.files.items() if name not in but}

    def size(self, name: str) -> int:
        return len(self.files[name])

    def read(self, name: str, offset: int, size: int) -> bytes:
        return self.files[name][offset : offset + size]

    def write(self, name: str, offset: int, data: bytes) -> None:
        raise NotImplementedError


def page(version: int, number: int) -> bytes:
    return f"{version:08}{number:08}".encode() * (PAGE_BYTES // 16)


PAGES = st.sets(st.integers(0, SIZE - 1), max_size=10)
ROUND = st.tuples(PAGES, PAGES, PAGES, PAGES)


@settings(max_examples=200, deadline=None)
@given(st.lists(ROUND, min_size=1, max_size=5), st.booleans())
def test_the_image_is_put_together_from_what_was_sent(
    rounds: list[tuple[set[int], set[int], set[int], set[int]]], last_is_sent: bool
) -> None:
    shared, store, truth = SharedMemory(), dict[int, bytes](), dict[int, bytes]()
    for version, (by_first, by_second, dropped, vanishing) in enumerate(rounds):
        visible = by_second & set(range(4, SIZE))
        truth |= {number: page(version, number) for number in by_first | visible}
        both = [changes(10, by_first, dropped - by_first), changes(11, by_second, set())]
        if version == len(rounds) - 1 and not last_is_sent:
            shared.outdate(both)
            break
        asked: list[int] = []
        for wanted in shared.round(both):
            numbers = numbers_of(wanted)
            asked += numbers
            lost = [number for number in numbers if number in vanishing]
            shared.unsent(wanted, [PageRun(number * PAGE_BYTES - wanted.shift, 1) for number in lost])
            store |= {number: truth[number] for number in numbers if number not in lost}
        assert sorted(asked) == sorted(set(asked)) == sorted(by_first | visible)
    images = Images(truth)
    for name, (number, spans) in shared.images(images).items():
        assert (name, number) == ("pages-5.img", -1)
        rebuilt = b"".join(
            b"".join(store[span.address // PAGE_BYTES + n] for n in range(span.pages))
            if span.sent
            else images.read(name, span.offset, span.pages * PAGE_BYTES)
            for span in spans
        )
        assert rebuilt == images.files[name]


def numbers_of(wanted: SharedRuns) -> list[int]:
    return [(run.start + wanted.shift) // PAGE_BYTES + n for run in wanted.runs for n in range(run.pages)]


def test_what_is_not_anonymous_shared_memory_is_left_to_the_images() -> None:
    changed = changes(10, {1, 2}, set())
    shm = Mapping(0x10000, 0x20000, "rw-s", Backing.SHMEM, 0, "00:05", 9, "/dev/shm/segment")
    other = ProcessChanges(10, 10, 1, False, Changes(changed.changes.dirty, (), (shm,), 0))
    assert list(SharedMemory().round([other])) == []


def with_segment(dirty: set[int], *, known: bool) -> ProcessChanges:
    """The object is a segment; whether the processes tell all that is written to it."""
    each = changes(10, dirty, set())
    private, mapping = each.changes.mappings
    mappings = (private, replace(mapping, name="/SYSV00000000 (deleted)"))
    closed = Closed(segments=frozenset({INODE})) if known else NOT_CLOSED
    return replace(each, changes=replace(each.changes, mappings=mappings), closed=closed)


def test_of_a_segment_only_what_all_processes_tell_is_kept() -> None:
    shared = SharedMemory()
    assert list(shared.round([with_segment({1}, known=False)])) == []
    list(shared.round([with_segment({1, 2}, known=True)]))
    assert sent_pages(shared) == {1, 2}
    assert list(shared.round([with_segment({3}, known=False)])) == []
    assert sent_pages(shared) == set()
    list(shared.round([with_segment({4}, known=True)]))
    assert sent_pages(shared) == {4}


def test_of_a_segment_that_is_not_known_in_the_end_nothing_is_kept() -> None:
    shared = SharedMemory()
    list(shared.round([with_segment({1, 2}, known=True)]))
    shared.outdate([with_segment(set(), known=False)])
    assert sent_pages(shared) == set()


def sent_pages(shared: SharedMemory) -> set[int]:
    """The pages that the destination has, of an image with all of them."""
    images = Images({number: page(1, number) for number in range(SIZE)})
    ((_, spans),) = shared.images(images).values()
    return {span.address // PAGE_BYTES + n for span in spans if span.sent for n in range(span.pages)}


def test_of_an_object_that_a_process_has_unmapped_only_later_pages_count() -> None:
    """What it wrote before is told by nobody."""
    shared = SharedMemory()
    list(shared.round([changes(10, {1, 2, 3}, set()), changes(11, {5}, set())]))
    assert sent_pages(shared) == {1, 2, 3, 5}
    without = replace(changes(11, set(), set()), changes=Changes((), (), (), 0))
    list(shared.round([changes(10, {7}, set()), without]))
    assert sent_pages(shared) == {7}
