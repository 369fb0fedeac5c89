"""Small images go in groups."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.agent.outgoing import batches

MOST = 100


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(0, MOST)))
def test_every_name_is_in_one_group_and_no_group_is_too_large(sizes: dict[str, int]) -> None:
    groups = list(batches(sizes, MOST))
    assert [name for group in groups for name in group] == sorted(sizes)
    assert all(group and sum(sizes[name] for name in group) <= MOST for group in groups)


def test_neighbours_that_fit_share_a_group() -> None:
    assert list(batches({"a": 60, "b": 40, "c": 1, "d": 100}, MOST)) == [["a", "b"], ["c"], ["d"]]
