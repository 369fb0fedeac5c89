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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from coordinator.agent.memory.base import PAGE_BYTES
from coordinator.agent.memory.runs import Spans, normalise

#: Compared together: with 64 KiB, SHA-256 is nearly as fast as it can be.
BLOCK_BYTES = 16 * PAGE_BYTES
#: Given to a thread at a time.
_BLOCKS_AT_ONCE = 64
_DIGEST_BYTES = hashlib.sha256().digest_size
_UNKNOWN = bytes(BLOCK_BYTES // PAGE_BYTES * _DIGEST_BYTES)

#: Reads so many bytes at an offset; fewer where the object ends.
Read = Callable[[int, int], bytes]


class SentDigests:
    """The digests of one object, which may have large holes."""

    def __init__(self) -> None:
        #: By the block's number, those of its pages one after the other; zero: not known.
        self._pages: dict[int, bytearray] = {}
        self._blocks: dict[int, bytes] = {}
        self._stopped = False

    def stop(self) -> None:
        """Nobody wants to know any more: a comparison that is under way ends soon, and all that is left differs."""
        self._stopped = True

    def note(self, offset: int, content: bytes | memoryview) -> None:
        """These whole pages are sent."""
        view = memoryview(content)
        for at in range(0, len(view), PAGE_BYTES):
            block, place = _place(offset + at)
            digests = self._pages.get(block)
            if digests is None:
                digests = self._pages[block] = bytearray(_UNKNOWN)
            digests[place : place + _DIGEST_BYTES] = hashlib.sha256(view[at : at + PAGE_BYTES]).digest()
            self._blocks.pop(block, None)

    def differing(self, read: Read, spans: Spans) -> Spans:
        """Those of the pages in ``spans`` (offsets) that are not as they were sent, or never were. Blocks until all are
        read; in as many threads as there are processors. Raises what ``read`` raises."""
        asked = list(_by_block(spans).items())
        groups = [asked[at : at + _BLOCKS_AT_ONCE] for at in range(0, len(asked), _BLOCKS_AT_ONCE)]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            found = threads.map(lambda group: self._differing(read, group), groups)
            return normalise(span for spans in found for span in spans)

    def _differing(self, read: Read, asked: list[tuple[int, Spans]]) -> Spans:
        """Of some blocks, each with the pages in question."""
        found: Spans = []
        for block, spans in asked:
            if self._stopped:
                found += spans
                continue
            start = block * BLOCK_BYTES
            view = memoryview(read(start, BLOCK_BYTES).ljust(BLOCK_BYTES, b"\0"))
            digest = hashlib.sha256(view).digest()
            if self._blocks.get(block) == digest:
                continue
            differing = self._differing_pages(start, view, spans)
            found += differing
            if not differing and spans == [(start, start + BLOCK_BYTES)]:  # of the others nothing is known
                self._blocks[block] = digest
        return found

    def _differing_pages(self, start: int, view: memoryview, spans: Spans) -> Spans:
        found: Spans = []
        for first, last in spans:
            for at in range(first, last, PAGE_BYTES):
                block, place = _place(at)
                known = self._pages.get(block, _UNKNOWN)[place : place + _DIGEST_BYTES]
                if known != hashlib.sha256(view[at - start : at - start + PAGE_BYTES]).digest():
                    found.append((at, at + PAGE_BYTES))
        return found


def _place(offset: int) -> tuple[int, int]:
    """The number of a page's block, and where its digest is among the block's."""
    return offset // BLOCK_BYTES, offset % BLOCK_BYTES // PAGE_BYTES * _DIGEST_BYTES


def _by_block(spans: Spans) -> dict[int, Spans]:
    found: dict[int, Spans] = {}
    for start, end in spans:
        at = start
        while at < end:
            block = at // BLOCK_BYTES
            until = min(end, (block + 1) * BLOCK_BYTES)
            found.setdefault(block, []).append((at, until))
            at = until
    return found
