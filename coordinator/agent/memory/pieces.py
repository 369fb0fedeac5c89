"""What is still to be filled into one address space: pieces of it, each with the place its content comes from. Pure.

All numbers are page numbers. A piece that nobody has moved comes from its own place; mremap(2) takes a piece elsewhere,
and its content is still found under the place it had on the source.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """Pages ``start`` to ``end``, the content of the first of which is that of page ``source``."""

    start: int
    end: int
    source: int

    def part(self, start: int, end: int) -> Piece:
        """What of it lies between two pages; empty if ``end`` is not above ``start``."""
        start, end = max(start, self.start), min(end, self.end)
        return Piece(start, end, self.source + start - self.start)


class Pieces:
    """A set of pieces that don't overlap, ordered by place."""

    def __init__(self, pieces: Iterable[Piece] = ()) -> None:
        self._pieces = sorted(piece for piece in pieces if piece.end > piece.start)

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def __iter__(self) -> Iterator[Piece]:
        return iter(tuple(self._pieces))

    def copy(self) -> Pieces:
        """The same again, as a forked child has it."""
        return Pieces(self._pieces)

    def within(self, start: int, end: int) -> list[Piece]:
        """What of the set lies between two pages."""
        low, high = self._range(start, end)
        return [piece.part(start, end) for piece in self._pieces[low:high]]

    def cut(self, start: int, end: int) -> list[Piece]:
        """Take what lies between two pages out of the set; returns it."""
        low, high = self._range(start, end)
        if low == high:
            return []
        touched = self._pieces[low:high]
        rest = [part for piece in touched for part in (piece.part(0, start), piece.part(end, piece.end))]
        self._pieces[low:high] = [part for part in rest if part.end > part.start]
        return [piece.part(start, end) for piece in touched]

    def move(self, start: int, to: int, count: int) -> None:
        """What lies in ``count`` pages from ``start`` lies at ``to`` from now on, where nothing of the set is left."""
        taken = self.cut(start, start + count)
        self.cut(to, to + count)
        for piece in taken:
            moved = Piece(piece.start - start + to, piece.end - start + to, piece.source)
            bisect.insort(self._pieces, moved)

    def _range(self, start: int, end: int) -> tuple[int, int]:
        """The indices of the pieces that have pages between two."""
        low = bisect.bisect_right(self._pieces, start, key=lambda piece: piece.end)
        high = bisect.bisect_left(self._pieces, end, key=lambda piece: piece.start)
        return low, max(low, high)
