"""Which pages are hidden from CRIU, and that none is lost."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.agent.memory.base import PAGE_BYTES, Changes, Mapping, ProcessChanges
from coordinator.agent.memory.hidden_pages import HiddenPages, hide, hideable, pays
from coordinator.agent.memory.mappings import parse_mapping, parse_smaps
from coordinator.agent.memory.pagemap import PRESENT, SWAPPED, WRITTEN, ScanArgument
from coordinator.agent.memory.runs import Spans, count_pages
from coordinator.agent.memory.scan_answer import looks_for_content
from coordinator.errors import TrackingFailed

ROOT, CHILD, STRANGER = 10, 11, 99
ANONYMOUS, SYSV = "/dev/zero (deleted)", "/SYSV00000000 (deleted)"
PRIVATE, OF_FILE = "rw-p 00000000 00:00 0", "rw-p 00000000 08:01 7 /lib/libc.so.6"


def mapping(first: int, last: int, rest: str = PRIVATE) -> Mapping:
    return parse_mapping(f"{first * PAGE_BYTES:x}-{last * PAGE_BYTES:x} {rest}")


def changes(pid: int, *mappings: Mapping, pages: int = 0) -> ProcessChanges:
    return ProcessChanges(pid, pid, 1, False, Changes((), (), mappings, pages))


def numbers(spans: Spans) -> list[tuple[int, int]]:
    return [(start // PAGE_BYTES, end // PAGE_BYTES) for start, end in spans]


def hidden_pages(*mappings: Mapping) -> HiddenPages:
    return HiddenPages(ROOT, processes=lambda _: [ROOT, CHILD], mappings=lambda _: list(mappings))


def visible(hidden: HiddenPages, first: int, last: int, pid: int = ROOT) -> list[tuple[int, int]] | None:
    seen = hidden.visible(pid, first * PAGE_BYTES, last * PAGE_BYTES)
    return None if seen is None else numbers(seen)


def test_what_lies_in_hidden_memory_is_cut_out() -> None:
    hidden = hidden_pages(mapping(1, 4), mapping(4, 6, OF_FILE), mapping(8, 9))
    assert visible(hidden, 1, 4) == []
    assert visible(hidden, 4, 6) is None
    assert visible(hidden, 0, 10) == [(0, 1), (4, 8), (9, 10)]
    assert visible(hidden, 3, 5, CHILD) == [(4, 5)]
    assert {pid: numbers(spans) for pid, spans in hidden.hidden.items()} == {ROOT: [(1, 4), (8, 9)], CHILD: [(3, 4)]}


def test_nothing_is_hidden_of_others_than_the_workload() -> None:
    hidden = hidden_pages(mapping(1, 4))
    assert visible(hidden, 1, 4, STRANGER) is None
    assert not hidden.hidden


@pytest.mark.parametrize(
    ("rest", "hides"),
    [
        (PRIVATE, True),
        ("rw-p 00000000 00:00 0 [heap]", True),
        ("rw-p 00000000 00:00 0 [stack]", True),
        ("---p 00000000 00:00 0", True),
        ("rw-p 00000000 00:05 7 /dev/zero", False),
        ("rw-p 00000000 00:10 9 /anon_hugepage (deleted)", False),
        ("rw-s 00000000 00:01 9 /dev/zero (deleted)", False),
        ("rw-s 00000000 00:0f 9 /[aio] (deleted)", False),
        ("r-xp 00000000 00:00 0 [vdso]", False),
        ("r--p 00000000 00:00 0 [vvar]", False),
        ("--xp 00000000 00:00 0 [vsyscall]", False),
        (OF_FILE, False),
    ],
)
def test_hidden_is_what_criu_registers(rest: str, hides: bool) -> None:
    """criu/include/vma.h, vma_entry_can_be_lazy."""
    assert bool(hideable([mapping(1, 2, rest)])) is hides


@pytest.mark.parametrize(("flag", "hides"), [("mw", True), ("lo", False), ("ht", False), ("ss", False), ("gd", True)])
def test_hidden_is_what_criu_registers_by_its_flags(flag: str, hides: bool) -> None:
    smaps = f"1000-3000 {PRIVATE}\nSize: 8 kB\nVmFlags: rd wr {flag}\n"
    assert bool(hideable(parse_smaps(smaps))) is hides


def test_the_frozen_tree_is_looked_at_once() -> None:
    looks = list[int]()

    def tree(root: int) -> list[int]:
        looks.append(root)
        return [ROOT, CHILD]

    hidden = HiddenPages(ROOT, processes=tree, mappings=lambda _: [mapping(1, 4)])
    for pid in (ROOT, CHILD, STRANGER, STRANGER):
        visible(hidden, 1, 4, pid)
    assert looks == [ROOT]


def test_what_was_hidden_must_be_answered_for() -> None:
    hidden = hidden_pages(mapping(1, 4), mapping(8, 9))
    visible(hidden, 0, 10)
    hidden.check([changes(ROOT, mapping(1, 2), mapping(2, 5), mapping(8, 9))])
    hidden.check([changes(CHILD), changes(ROOT, mapping(0, 9))])


@pytest.mark.parametrize(
    "answers",
    [
        [],
        [changes(CHILD, mapping(0, 9))],
        [changes(ROOT)],
        [changes(ROOT, mapping(1, 4))],
        [changes(ROOT, mapping(1, 4), mapping(8, 9, OF_FILE))],
    ],
)
def test_hidden_pages_that_nobody_copied_end_the_move(answers: list[ProcessChanges]) -> None:
    hidden = hidden_pages(mapping(1, 4), mapping(8, 9))
    visible(hidden, 0, 10)
    with pytest.raises(TrackingFailed, match=f"process {ROOT}: "):
        hidden.check(answers)


def test_where_nothing_was_hidden_nothing_is_missed() -> None:
    hidden_pages(mapping(1, 4)).check([])


@pytest.mark.parametrize(
    ("pages", "mappings", "yes"),
    [
        (0, 0, False),
        (16 << 8, 100, False),
        (64 << 8, 100, False),
        (128 << 8, 100, True),
        (128 << 8, 1000, False),
        (512 << 8, 1000, True),
    ],
)
def test_pages_are_hidden_where_that_is_faster(pages: int, mappings: int, yes: bool) -> None:
    """Of a tree, all its processes together."""
    half = changes(ROOT, *[mapping(1, 2)] * (mappings // 2), pages=pages // 2)
    known = [half, replace(half, pid=CHILD)]
    assert pays(known) is yes
    assert (hide(ROOT, known) is not None) is yes


@pytest.mark.parametrize(
    ("pages", "name", "yes"),
    [(800, ANONYMOUS, True), (700, ANONYMOUS, False), (200, ANONYMOUS, False), (2048, SYSV, False)],
)
def test_shared_objects_are_hidden_where_that_is_faster(pages: int, name: str, yes: bool) -> None:
    """With so many mappings that private memory is better seen; one object in two processes counts once."""
    shared = mapping(0, pages, f"rw-s 00000000 00:01 7 {name}")
    known = [changes(ROOT, shared, *[mapping(4000, 4001)] * 1000, pages=100)]
    hidden = hide(ROOT, [*known, replace(known[0], pid=CHILD)])
    assert (hidden is not None) is yes
    if hidden is not None:
        assert (hidden.private, list(hidden.may_hide)) == (False, [7])
        found = HiddenPages(
            ROOT, private=False, objects=hidden.may_hide, processes=lambda _: [ROOT], mappings=lambda _: [shared]
        )
        assert [found.hides(inode) for inode in (8, 7, 7)] == [False, True, False]
        assert list(found.objects) == [7]


def test_each_task_is_read_once_however_many_objects_there_are() -> None:
    read: list[int] = []

    def mappings(pid: int) -> list[Mapping]:
        read.append(pid)
        return [mapping(0, 300, f"rw-s 00000000 00:01 {pid} {ANONYMOUS}")]

    hidden = HiddenPages(ROOT, objects=[3, 2, 1, 7], processes=lambda _: [1, 2, 3], mappings=mappings)
    assert [hidden.hides(inode) for inode in (2, 7, 7, 3, 1)] == [True, False, False, True, True]
    assert read == [1, 2, 3]


def test_an_object_that_is_not_mapped_any_more_is_not_hidden() -> None:
    """A memfd may have a descriptor left."""
    hidden = HiddenPages(ROOT, objects=[7], processes=lambda _: [ROOT], mappings=lambda _: [mapping(1, 2)])
    assert not hidden.hides(7)
    assert not hidden.objects


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(0, 30), st.integers(1, 30))
def test_every_page_is_visible_or_hidden(ends: list[int], first: int, length: int) -> None:
    edges = sorted({*ends, 0, 40})
    kinds = [(PRIVATE, OF_FILE)[number % 2] for number in range(len(edges))]
    mappings = [mapping(*each) for each in zip(edges, edges[1:], kinds, strict=False)]
    hidden = hidden_pages(*mappings)
    seen = visible(hidden, first, first + length)
    kept = hidden.hidden.get(ROOT, [])
    pages = {page for start, end in ([(first, first + length)] if seen is None else seen) for page in range(start, end)}
    assert len(pages) + count_pages(kept) == length
    for page in range(first, first + length):
        (of,) = (each for each in mappings if each.start <= page * PAGE_BYTES < each.end) if page < 40 else (None,)
        assert (page in pages) is (of is None or not of.lazy)


@pytest.mark.parametrize(
    ("change", "content"),
    [
        ({}, True),
        ({"flags": 1}, False),
        ({"max_pages": 7}, False),
        ({"vec_len": 0}, False),
        ({"category_anyof_mask": 0}, False),
        ({"category_anyof_mask": PRESENT | WRITTEN}, False),
    ],
)
def test_only_scans_for_content_are_answered(change: dict[str, int], content: bool) -> None:
    fields = {"vec_len": 10, "start": 0, "end": PAGE_BYTES, "category_anyof_mask": PRESENT | SWAPPED, **change}
    assert looks_for_content(ScanArgument(ctypes.sizeof(ScanArgument), **fields)) is content
