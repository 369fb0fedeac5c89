"""The page store against a plain dictionary, and what it costs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.agent.memory.store import PAGE_BYTES, PageStore

PIDS = st.sampled_from([1, 7])
NUMBERS = st.integers(0, 40)
COUNTS = st.integers(1, 12)
STEPS = st.one_of(
    st.tuples(st.just("put"), PIDS, NUMBERS, COUNTS, st.integers(1, 255)),
    st.tuples(st.just("drop"), PIDS, NUMBERS, COUNTS, st.just(0)),
    st.tuples(st.just("drop_process"), PIDS, st.just(0), st.just(0), st.just(0)),
)


@pytest.fixture
def store() -> Iterator[PageStore]:
    held = PageStore()
    yield held
    held.close()


def page(value: int, number: int) -> bytes:
    return bytes([value, number % 256]) * (PAGE_BYTES // 2)


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
            elif step == "drop":
                store.drop(pid, first * PAGE_BYTES, count)
                model = {key: each for key, each in model.items() if key[0] != pid or key[1] not in numbers}
            else:
                store.drop_process(pid)
                model = {key: each for key, each in model.items() if key[0] != pid}
        assert store.pages == len(model)
        for pid in (1, 7):
            expected = b"".join(model.get((pid, number), bytes(PAGE_BYTES)) for number in range(60))
            assert store.read(pid, 0, 60) == expected
            assert [store.holds(pid, n * PAGE_BYTES) for n in range(60)] == [(pid, n) in model for n in range(60)]
    finally:
        store.close()


def test_dropped_pages_give_their_memory_back(store: PageStore) -> None:
    store.put(1, 0, os.urandom(PAGE_BYTES) * 256)
    blocks = os.fstat(store._file).st_blocks
    store.drop(1, 0, 256)
    assert os.fstat(store._file).st_blocks < blocks / 2
    assert store.read(1, 0, 256) == bytes(PAGE_BYTES * 256)


def test_memory_is_that_of_the_pages(store: PageStore) -> None:
    for number in range(0, 4096, 2):
        store.put(1, number * PAGE_BYTES, page(1, number))
    assert os.fstat(store._file).st_blocks * 512 <= 2048 * PAGE_BYTES * 1.1


def test_part_of_a_page_is_refused(store: PageStore) -> None:
    with pytest.raises(ValueError, match="no whole pages"):
        store.put(1, 0, b"x")
    with pytest.raises(ValueError, match="no whole pages"):
        store.put(1, 5, bytes(PAGE_BYTES))
