"""The page store against a plain dictionary, and what it costs."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.agent.memory.store import ABSENT, BLOCK_PAGES, ON_SOURCE, PAGE_BYTES, PageStore

PIDS = st.sampled_from([1, 7])
NUMBERS = st.integers(500, 540)  # on both sides of the end of a block
COUNTS = st.integers(1, 12)
STEPS = st.one_of(
    st.tuples(st.just("put"), PIDS, NUMBERS, COUNTS, st.integers(1, 255)),
    st.tuples(st.just("drop"), PIDS, NUMBERS, COUNTS, st.just(0)),
    st.tuples(st.just("expect"), PIDS, NUMBERS, COUNTS, st.just(0)),
    st.tuples(st.just("drop_process"), PIDS, st.just(0), st.just(0), st.just(0)),
)


@pytest.fixture
def store() -> Iterator[PageStore]:
    held = PageStore()
    yield held
    held.close()


def page(value: int, number: int) -> bytes:
    return bytes([value, number % 256]) * (PAGE_BYTES // 2)


def held(store: PageStore, pid: int) -> set[int]:
    """What the index says, as the filler reads it."""
    index = os.pread(store.index_file, 1 << 20, 0)
    slots = array("I", index)
    return {
        block * BLOCK_PAGES + number
        for block, at in store.directory().get(pid, {}).items()
        for number in range(BLOCK_PAGES)
        if slots[at * BLOCK_PAGES + number] not in (ABSENT, ON_SOURCE)
    }


@settings(max_examples=150, deadline=None)
@given(st.lists(STEPS, max_size=25))
def test_it_is_a_dictionary_of_pages(steps: list[tuple[str, int, int, int, int]]) -> None:
    store, model = PageStore(), dict[tuple[int, int], bytes]()
    try:
        for step, pid, first, count, value in steps:
            numbers = range(first, first + count)
            if step == "put":
                content = [page(value, number) for number in numbers]
                store.put(pid, first * PAGE_BYTES, b"".join(content))
                model.update({(pid, number): each for number, each in zip(numbers, content, strict=True)})
            elif step == "expect":
                store.expect(pid, first * PAGE_BYTES, count)
            elif step == "drop":
                store.drop(pid, first * PAGE_BYTES, count)
                model = {key: each for key, each in model.items() if key[0] != pid or key[1] not in numbers}
            else:
                store.drop_process(pid)
                model = {key: each for key, each in model.items() if key[0] != pid}
        assert store.pages == len(model)
        for pid in (1, 7):
            expected = b"".join(model.get((pid, number), bytes(PAGE_BYTES)) for number in range(500, 560))
            assert store.read(pid, 500 * PAGE_BYTES, 60) == expected
            assert held(store, pid) == {number for of, number in model if of == pid}
    finally:
        store.close()


def test_dropped_pages_give_their_memory_back(store: PageStore) -> None:
    store.put(1, 0, os.urandom(PAGE_BYTES) * 256)
    blocks = os.fstat(store.pages_file).st_blocks
    store.drop(1, 0, 256)
    assert os.fstat(store.pages_file).st_blocks < blocks / 2
    assert store.read(1, 0, 256) == bytes(PAGE_BYTES * 256)


def test_memory_is_that_of_the_pages(store: PageStore) -> None:
    for number in range(0, 4096, 2):
        store.put(1, number * PAGE_BYTES, page(1, number))
    assert os.fstat(store.pages_file).st_blocks * 512 <= 2048 * PAGE_BYTES * 1.1


def test_part_of_a_page_is_refused(store: PageStore) -> None:
    with pytest.raises(ValueError, match="no whole pages"):
        store.put(1, 0, b"x")
    with pytest.raises(ValueError, match="no whole pages"):
        store.put(1, 5, bytes(PAGE_BYTES))
