"""Sets of pages as sorted, disjoint spans of addresses (pure). What they cost grows with the runs, not the pages.

A ``Spans`` is a list of ``(start, end)`` in bytes, page aligned, sorted, with a gap between neighbours. All functions
take and return such lists, walk each of them once, and change none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from coordinator.agent.memory.base import PAGE_BYTES, Mapping, PageRun

Span = tuple[int, int]
Spans = list[Span]


def normalise(spans: Iterable[Span]) -> Spans:
    """Sort and merge any spans into a ``Spans``; empty ones vanish."""
    merged: Spans = []
    for start, end in sorted(spans):
        if start >= end:
            continue
        if merged and start <= merged[-1][1]:
            if end > merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def union(*sets: Spans) -> Spans:
    """The pages that are in at least one set."""
    filled = [spans for spans in sets if spans]
    if len(filled) <= 1:
        return list(filled[0]) if filled else []
    return normalise(span for spans in filled for span in spans)


def intersection(left: Spans, right: Spans) -> Spans:
    """The pages that are in both sets."""
    common: Spans = []
    i = j = 0
    while i < len(left) and j < len(right):
        start, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < end:
            common.append((start, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return common


def difference(left: Spans, right: Spans) -> Spans:
    """The pages of ``left`` that are not in ``right``."""
    rest: Spans = []
    j = 0
    for start, end in left:
        while j < len(right) and right[j][1] <= start:
            j += 1
        position, k = start, j
        while k < len(right) and right[k][0] < end:
            if right[k][0] > position:
                rest.append((position, right[k][0]))
            position = max(position, right[k][1])
            k += 1
        if position < end:
            rest.append((position, end))
        j = max(j, k - 1)
    return rest


def spans_of(mappings: Iterable[Mapping]) -> Spans:
    """The pages of mappings; neighbours are merged."""
    return normalise((mapping.start, mapping.end) for mapping in mappings)


def touching(mappings: Sequence[Mapping], spans: Spans) -> list[Mapping]:
    """The mappings with at least one page of the spans; both are sorted."""
    found: list[Mapping] = []
    i = 0
    for mapping in mappings:
        while i < len(spans) and spans[i][1] <= mapping.start:
            i += 1
        if i < len(spans) and spans[i][0] < mapping.end:
            found.append(mapping)
    return found


def to_runs(spans: Spans, mappings: Sequence[Mapping]) -> tuple[PageRun, ...]:
    """Spans as runs that never cross the end of a mapping; what lies in no mapping is left out."""
    runs: list[PageRun] = []
    i = 0
    for start, end in spans:
        while i < len(mappings) and mappings[i].end <= start:
            i += 1
        k = i
        while k < len(mappings) and mappings[k].start < end:
            first, last = max(start, mappings[k].start), min(end, mappings[k].end)
            runs.append(PageRun(first, (last - first) // PAGE_BYTES))
            k += 1
    return tuple(runs)


def plain_runs(spans: Spans) -> tuple[PageRun, ...]:
    """Spans as runs, whatever is mapped there now."""
    return tuple(PageRun(start, (end - start) // PAGE_BYTES) for start, end in spans)


def count_pages(spans: Spans) -> int:
    """Number of pages in a set."""
    return sum(end - start for start, end in spans) // PAGE_BYTES
