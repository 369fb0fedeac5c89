"""Hot pages in CRIU's images: which they are, where their contents go, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.agent.memory.base import PAGE_BYTES
from coordinator.agent.memory.filling import LazyMemory
from coordinator.agent.memory.prefetch import Entry, parse, prefetch, processes, serialize, small_pieces
from coordinator.agent.messages import DroppedPages, PageBatch
from coordinator.errors import RestoreFailed

LAZY, PRESENT = 2, 4
#: (gap before, pages, lazy): the runs of a page map.
RUNS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.booleans()), max_size=8)
HOT = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8)), max_size=8)


def content(kind: str, number: int) -> bytes:
    return f"{kind}{number:07}".encode() * (PAGE_BYTES // 8)


def entry(first: int, pages: int, flags: int, *, wide: bool) -> Entry:
    fields = {1: first * PAGE_BYTES, 2: 0 if wide else pages, 4: flags}
    return Entry(fields | {5: pages} if wide else fields)


def image_of(folder: Path) -> tuple[dict[int, bytes], frozenset[int]]:
    """What the images say: the contents of present pages, and the lazy ones."""
    head, entries = parse((folder / "pagemap-7.img").read_bytes(), folder)
    pages = (folder / f"pages-{head.fields[1]}.img").read_bytes()
    present: dict[int, bytes] = {}
    lazy: set[int] = set()
    at = 0
    last = -1
    for each in entries:
        assert each.start // PAGE_BYTES > last, "entries are sorted and disjoint"
        numbers = range(each.start // PAGE_BYTES, each.start // PAGE_BYTES + each.pages)
        last = numbers[-1]
        if each.flags & PRESENT:
            for number in numbers:
                present[number], at = pages[at : at + PAGE_BYTES], at + PAGE_BYTES
        else:
            lazy.update(numbers)
    assert at == len(pages)
    return present, frozenset(lazy)


@settings(max_examples=200, deadline=None)
@given(RUNS, HOT, st.booleans(), st.integers(0, 40))
def test_hot_lazy_pages_become_present_and_nothing_else_changes(
    tmp_path_factory: pytest.TempPathFactory,
    runs: list[tuple[int, int, bool]],
    hot: list[tuple[int, int]],
    wide: bool,
    pages: int,
) -> None:
    folder = tmp_path_factory.mktemp("images")
    entries, at = [], 0
    for gap, length, is_lazy in runs:
        at += gap
        entries.append(entry(at, length, LAZY if is_lazy else PRESENT, wide=wide))
        at += length
    old = b"".join(
        content("o", each.start // PAGE_BYTES + n)
        for each in entries
        if each.flags == PRESENT
        for n in range(each.pages)
    )
    (folder / "pagemap-7.img").write_bytes(serialize(Entry({1: 3}), entries))
    (folder / "pages-3.img").write_bytes(old)
    before_present, before_lazy = image_of(folder)

    def read(pid: int, address: int, pages: int) -> bytes:
        return b"".join(content("s", address // PAGE_BYTES + n) for n in range(pages))

    wanted = [range(first, first + count) for first, count in hot]
    stored = {number for numbers in wanted for number in numbers} | set(range(0, 60, 2))

    def held(pid: int, numbers: range) -> list[range]:
        return [range(number, number + 1) for number in numbers if number in stored]

    moved = prefetch(folder, 7, wanted, read, held=held, pages=pages)
    small = {number for piece in small_pieces(entries, pages - sum(map(len, wanted))) for number in piece}
    expected = ({number for numbers in wanted for number in numbers} | small & stored) & before_lazy
    present, lazy = image_of(folder)
    assert moved == len(expected)
    assert lazy == before_lazy - expected
    assert present == before_present | {number: content("s", number) for number in expected}


def test_the_smallest_pieces_come_first_and_only_whole() -> None:
    runs = [entry(0, 100, LAZY, wide=True), entry(200, 5, LAZY, wide=True), entry(300, 3, PRESENT, wide=True)]
    runs += [entry(400, 2, LAZY, wide=True)]
    assert small_pieces(runs, 50) == [range(400, 402), range(200, 205)]
    assert small_pieces(runs, 6) == [range(400, 402)]
    assert small_pieces(runs, -1) == []


def test_processes_are_those_with_a_page_map(tmp_path: Path) -> None:
    for name in ("pagemap-7.img", "pagemap-12.img", "pagemap-shmem-99.img", "core-7.img"):
        (tmp_path / name).touch()
    assert processes(tmp_path) == [7, 12]


def test_what_is_no_page_map_is_told(tmp_path: Path) -> None:
    (tmp_path / "pagemap-7.img").write_bytes(b"something else")
    with pytest.raises(RestoreFailed, match=r"pagemap-7\.img is no page map"):
        prefetch(tmp_path, 7, [range(3)], lambda *_: b"", held=lambda *_: [], pages=0)


def test_a_field_of_another_type_is_told(tmp_path: Path) -> None:
    (tmp_path / "pagemap-7.img").write_bytes(serialize(Entry({1: 1}), []) + b"\x02\0\0\0\x0a\x00")
    with pytest.raises(RestoreFailed, match="wire type 2"):
        prefetch(tmp_path, 7, [range(3)], lambda *_: b"", held=lambda *_: [], pages=0)


async def test_pages_that_are_to_be_fetched_are_not_taken_for_zero(tmp_path: Path) -> None:
    (tmp_path / "pagemap-7.img").write_bytes(serialize(Entry({1: 3}), [entry(0, 4, LAZY, wide=True)]))
    (tmp_path / "pages-3.img").touch()
    memory = LazyMemory("4.2.1")
    try:
        pages = b"".join(content("s", number) for number in range(4))
        memory.take(PageBatch(pid=7, starts=(0,), counts=(4,)), pages)
        memory.take(DroppedPages(pid=7, starts=(PAGE_BYTES,), counts=(1,)), b"")
        memory._prefetch(tmp_path)
        assert image_of(tmp_path) == ({number: content("s", number) for number in (0, 2, 3)}, frozenset({1}))
    finally:
        await memory.close()
