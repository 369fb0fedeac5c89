"""What the pages of a shared object were when they were sent, for objects that can be written to past all page tables.

A memfd with a descriptor is one: nothing tells, by page, of every write(2), or of a mapping that came and went between
two looks. So what was sent is remembered, 32 bytes a page, and compared with what there is when nobody can write any
more. Of SHA-256 no two inputs with the same digest are known.

To compare page by page takes some 0.8 s for each gigabyte, in one thread: more of them wait for Python's lock. So a
comparison that finds a *block* of pages to be as they were sent remembers the digest of the whole block. Where that is
still the same nothing else is computed, and threads do not wait for each other.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from coordinator.agent.memory.base import PAGE_BYTES
from coordinator.agent.memory.runs import Span, Spans, intersection, normalise

#: Compared together: with 64 KiB, SHA-256 is nearly as fast as it can be.
BLOCK_BYTES = 16 * PAGE_BYTES
#: Given to a thread at a time.
_STRETCH_BYTES = 64 * BLOCK_BYTES
_DIGEST_BYTES = hashlib.sha256().digest_size

#: Reads so many bytes at an offset; fewer where the object ends.
Read = Callable[[int, int], bytes]


class SentDigests:
    """The digests of one object."""

    def __init__(self) -> None:
        self._pages = bytearray()
        self._blocks: dict[int, bytes] = {}

    def note(self, offset: int, content: bytes | memoryview) -> None:
        """These whole pages are sent."""
        view = memoryview(content)
        first, count = offset // PAGE_BYTES, len(view) // PAGE_BYTES
        missing = (first + count) * _DIGEST_BYTES - len(self._pages)
        self._pages.extend(bytes(max(missing, 0)))
        for page in range(count):
            digest = hashlib.sha256(view[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]).digest()
            self._pages[(first + page) * _DIGEST_BYTES : (first + page + 1) * _DIGEST_BYTES] = digest
        for block in range(offset // BLOCK_BYTES, -(-(offset + len(view)) // BLOCK_BYTES)):
            self._blocks.pop(block, None)

    def differing(self, read: Read, spans: Spans) -> Spans:
        """Those of the pages in ``spans`` (offsets) that are not as they were sent, or never were. Blocks until all are
        read; in as many threads as there are processors. Raises what ``read`` raises."""
        stretches = [
            (at, min(at + _STRETCH_BYTES, end))
            for start, end in _whole_blocks(spans)
            for at in range(start, end, _STRETCH_BYTES)
        ]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            found = threads.map(
                lambda stretch: self._differing(read, stretch, intersection([stretch], spans)), stretches
            )
            return normalise(span for spans in found for span in spans)

    def _differing(self, read: Read, stretch: Span, spans: Spans) -> Spans:
        found: Spans = []
        for start in range(*stretch, BLOCK_BYTES):
            content = read(start, BLOCK_BYTES)
            view = memoryview(content.ljust(BLOCK_BYTES, b"\0"))
            digest = hashlib.sha256(view).digest()
            if self._blocks.get(start // BLOCK_BYTES) == digest:
                continue
            block = (start, start + BLOCK_BYTES)
            asked = intersection([block], spans)
            differing = self._differing_pages(start, view, asked)
            found += differing
            if not differing and asked == [block]:  # of the others nothing is known
                self._blocks[start // BLOCK_BYTES] = digest
        return found

    def _differing_pages(self, start: int, view: memoryview, spans: Spans) -> Spans:
        found: Spans = []
        for first, last in spans:
            for at in range(first, last, PAGE_BYTES):
                digest = hashlib.sha256(view[at - start : at - start + PAGE_BYTES]).digest()
                place = at // PAGE_BYTES * _DIGEST_BYTES
                if self._pages[place : place + _DIGEST_BYTES] != digest:
                    found.append((at, at + PAGE_BYTES))
        return found


def _whole_blocks(spans: Iterable[Span]) -> Spans:
    return normalise((start - start % BLOCK_BYTES, end + -end % BLOCK_BYTES) for start, end in spans)
