"""Messages about the pages of a process, or of a shared object, put together (pure)."""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.agent.memory.base import PAGE_BYTES
from coordinator.agent.memory.runs import Spans
from coordinator.agent.messages import DroppedPages, PageBatch

#: Runs named in one message; the header stays far below the channel's bound.
_RUNS_PER_MESSAGE = 4096


def consecutive(number: int, start: int, content: bytes) -> PageBatch:
    """Of whole pages, one after the other."""
    return PageBatch(pid=number, starts=(start,), counts=(len(content) // PAGE_BYTES,))


def dropped(number: int, spans: Spans) -> Iterator[DroppedPages]:
    """Of pages that hold nothing any more."""
    for at in range(0, len(spans), _RUNS_PER_MESSAGE):
        part = spans[at : at + _RUNS_PER_MESSAGE]
        starts = tuple(start for start, _ in part)
        counts = tuple((end - start) // PAGE_BYTES for start, end in part)
        yield DroppedPages(pid=number, starts=starts, counts=counts)
