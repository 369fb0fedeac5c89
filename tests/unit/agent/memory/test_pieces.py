"""What is still to be filled in, against a dictionary of pages."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.agent.memory.pieces import Piece, Pieces

PAGES = st.integers(0, 40)
COUNTS = st.integers(1, 15)
STEPS = st.one_of(
    st.tuples(st.just("cut"), PAGES, COUNTS, st.just(0)),
    st.tuples(st.just("move"), PAGES, COUNTS, PAGES),
)


def as_pages(pieces: Pieces | list[Piece]) -> dict[int, int]:
    """Every page and where its content comes from."""
    found: dict[int, int] = {}
    for piece in pieces:
        for number in range(piece.end - piece.start):
            assert piece.start + number not in found, "no page is in two pieces"
            found[piece.start + number] = piece.source + number
    return found


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=12), PAGES, COUNTS)
def test_it_is_a_dictionary_of_pages(steps: list[tuple[str, int, int, int]], start: int, count: int) -> None:
    pieces = Pieces([Piece(20, 30, 20), Piece(2, 9, 2), Piece(9, 12, 9), Piece(35, 35, 35)])
    model = {page: page for page in (*range(2, 12), *range(20, 30))}
    for step, first, length, to in steps:
        inside = {page: source for page, source in model.items() if first <= page < first + length}
        for page in inside:
            del model[page]
        if step == "cut":
            assert as_pages(pieces.cut(first, first + length)) == inside
        elif abs(to - first) >= length:  # the kernel moves nothing onto itself
            pieces.move(first, to, length)
            model = {page: source for page, source in model.items() if not to <= page < to + length}
            model.update({page - first + to: source for page, source in inside.items()})
        else:
            pieces.cut(first, first + length)
        assert as_pages(pieces) == model
        assert bool(pieces) == bool(model)
    wanted = {page: source for page, source in model.items() if start <= page < start + count}
    assert as_pages(pieces.within(start, start + count)) == wanted


def test_a_copy_goes_its_own_way() -> None:
    pieces = Pieces([Piece(0, 10, 0)])
    copy = pieces.copy()
    pieces.cut(0, 5)
    assert as_pages(copy) == {page: page for page in range(10)}
