"""Sets of pages behave like sets of pages."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from coordinator.agent.memory import runs
from coordinator.agent.memory.base import PAGE_BYTES, Backing, Mapping
from coordinator.agent.memory.pages import batches

numbers = st.sets(st.integers(0, 60))


def spans(pages: set[int]) -> runs.Spans:
    return runs.normalise((page * PAGE_BYTES, (page + 1) * PAGE_BYTES) for page in pages)


def numbers_of(these: runs.Spans) -> set[int]:
    return {address // PAGE_BYTES for start, end in these for address in range(start, end, PAGE_BYTES)}


def canonical(these: runs.Spans) -> bool:
    return all(start < end for start, end in these) and all(left[1] < right[0] for left, right in pairwise(these))


@given(numbers, numbers, numbers)
def test_they_are_sets(left: set[int], right: set[int], third: set[int]) -> None:
    for result, expected in (
        (runs.union(spans(left), spans(right), spans(third)), left | right | third),
        (runs.intersection(spans(left), spans(right)), left & right),
        (runs.difference(spans(left), spans(right)), left - right),
    ):
        assert numbers_of(result) == expected
        assert canonical(result)
    assert runs.count_pages(spans(left)) == len(left)


def mapping(first: int, last: int) -> Mapping:
    return Mapping(first * PAGE_BYTES, last * PAGE_BYTES, "rw-p", Backing.ANONYMOUS, 0, "00:00", 0, "")


@given(numbers, st.lists(st.integers(0, 60), unique=True))
def test_runs_stay_within_mappings(pages: set[int], borders: list[int]) -> None:
    borders.sort()
    mappings = [mapping(first, last) for first, last in zip(borders[::2], borders[1::2], strict=False)]
    found = runs.to_runs(spans(pages), mappings)
    inside = {page for page in pages for each in mappings if each.start <= page * PAGE_BYTES < each.end}
    assert {run.start // PAGE_BYTES + page for run in found for page in range(run.pages)} == inside
    for run in found:
        assert any(each.start <= run.start and run.end <= each.end for each in mappings)


@given(numbers, st.integers(1, 20))
def test_batches_cut_and_keep_everything(pages: set[int], limit: int) -> None:
    wanted = runs.plain_runs(spans(pages))
    groups = list(batches(wanted, limit * PAGE_BYTES))
    assert all(0 < sum(run.pages for run in group) <= limit for group in groups)
    told = [run.start // PAGE_BYTES + page for group in groups for run in group for page in range(run.pages)]
    assert told == sorted(pages)
