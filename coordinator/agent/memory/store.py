"""The page store of a migration on the destination: one memory file, one slot of it for each page it holds.

Pages arrive in rounds, in any order and more than once; the last one wins. A page that was discarded on the source is
dropped here too, or it would come back with its old content. Pages that were never sent cost nothing: they are zero.

The index is a second memory file, four bytes a page: the filler (``filler.py``), a process of its own, has both mapped
and copies pages from one into the tasks by the other, without a byte of them passing through here.
"""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Iterable, Iterator
from itertools import pairwise

PAGE_BYTES = mmap.PAGESIZE

#: A block of the index names the slots of so many consecutive pages, beginning at a multiple of it.
BLOCK_PAGES = 512
#: What the index says of a page that is not held: it holds nothing, or its content is still on the source.
ABSENT, ON_SOURCE = 0, 0xFFFF_FFFF
#: Bytes of a number in the index.
SLOT_BYTES = 4

#: The memory file grows in steps of this many pages (64 MiB of 4 KiB pages); unused ones are never touched.
_GROW_PAGES = 16384
#: Blocks of the index that are mapped at once.
_BLOCKS_AT_ONCE = 64
_NOTHING = memoryview(array("I", bytes(BLOCK_PAGES * SLOT_BYTES)))


class PageStore:
    """Pages by (pid, page number). ``pid`` is the one in CRIU's images: that of the innermost pid namespace."""

    def __init__(self) -> None:
        self.pages_file = os.memfd_create("livemove-pages", os.MFD_CLOEXEC)
        self.index_file = os.memfd_create("livemove-index", os.MFD_CLOEXEC)
        self._blocks: dict[int, dict[int, int]] = {}
        self._views: list[memoryview] = []
        self._unused_blocks: list[int] = []
        self._free: list[int] = []
        self._end = 1  # slot 0 is ABSENT
        self._size = 0
        self.pages = 0
        self._add_blocks()

    def put(self, pid: int, start: int, data: bytes | memoryview) -> None:
        """Store the pages from address ``start``; ``data`` is a whole number of pages, and replaces older content.

        Raises ``OSError`` (ENOMEM, ENOSPC) if the host has no memory left."""
        first, count = start // PAGE_BYTES, len(data) // PAGE_BYTES
        if start % PAGE_BYTES or len(data) % PAGE_BYTES:
            raise ValueError(f"{len(data)} bytes at {start:#x} are no whole pages")
        parts = [self._block(pid, number)[begin:end] for number, begin, end in blocks_of(first, count)]
        before = [slot for part in parts for slot in part]
        fresh = sum(slot in (ABSENT, ON_SOURCE) for slot in before)
        if fresh == count and not self._free:
            slots = list(range(self._end, self._end + count))
            self._grow(count)
        else:
            slots = [self._slot() if slot in (ABSENT, ON_SOURCE) else slot for slot in before]
        view = memoryview(data)
        for position, slot, length in contiguous(slots):
            self._write(slot, view[position * PAGE_BYTES : (position + length) * PAGE_BYTES])
        # Last, because the filler may look at any time: what the index names is there.
        named = memoryview(array("I", slots))
        for part in parts:
            part[:], named = named[: len(part)], named[len(part) :]
        self.pages += fresh

    def drop(self, pid: int, start: int, pages: int) -> None:
        """Forget pages and give their memory back; those that are not held are passed over."""
        known = self._blocks.get(pid, {})
        for number, begin, end in blocks_of(start // PAGE_BYTES, pages, known):
            self._forget(self._view(known[number])[begin:end])

    def drop_process(self, pid: int) -> None:
        """Forget all pages of a process that is gone."""
        for block in self._blocks.pop(pid, {}).values():
            self._forget(self._view(block))
            self._unused_blocks.append(block)

    def expect(self, pid: int, start: int, pages: int) -> None:
        """Pages that the source still has: those of them that are not held are marked ON_SOURCE until they are put."""
        for number, begin, end in blocks_of(start // PAGE_BYTES, pages):
            part = self._block(pid, number)[begin:end]
            part[:] = memoryview(array("I", [ON_SOURCE if slot == ABSENT else slot for slot in part]))

    def read(self, pid: int, start: int, pages: int) -> bytes:
        """The content of consecutive pages; pages that are not held are zero."""
        known = self._blocks.get(pid, {})
        slots: list[int] = []
        for number, begin, end in blocks_of(start // PAGE_BYTES, pages):
            slots += (self._view(known[number]) if number in known else _NOTHING)[begin:end]
        parts = [
            bytes(length * PAGE_BYTES)
            if slot in (ABSENT, ON_SOURCE)
            else os.pread(self.pages_file, length * PAGE_BYTES, slot * PAGE_BYTES)
            for _, slot, length in contiguous(slots)
        ]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def directory(self) -> dict[int, dict[int, int]]:
        """For each process the blocks of the index by the number of their first page ÷ BLOCK_PAGES."""
        return {pid: blocks for pid, blocks in self._blocks.items() if blocks}

    def reserve(self, more: int) -> int:
        """Make the file as long as it will be with so many more pages, which takes no memory; returns its slots."""
        self._lengthen(self._end + more)
        return self._end + more

    def close(self) -> None:
        """Give all memory back, as far as nobody else has it open. Idempotent."""
        if self.pages_file >= 0:
            os.close(self.pages_file)
            os.close(self.index_file)
            self.pages_file = self.index_file = -1
        self._views.clear()
        self._blocks.clear()

    def _block(self, pid: int, number: int) -> memoryview:
        """The slots of a block of a process, made if there is none."""
        blocks = self._blocks.setdefault(pid, {})
        if number not in blocks:
            if not self._unused_blocks:
                self._add_blocks()
            blocks[number] = self._unused_blocks.pop()
        return self._view(blocks[number])

    def _add_blocks(self) -> None:
        first = len(self._views) * _BLOCKS_AT_ONCE
        offset, length = (blocks * BLOCK_PAGES * SLOT_BYTES for blocks in (first, _BLOCKS_AT_ONCE))
        os.ftruncate(self.index_file, offset + length)
        self._views.append(memoryview(mmap.mmap(self.index_file, length, offset=offset)).cast("I"))
        self._unused_blocks.extend(range(first + _BLOCKS_AT_ONCE - 1, first - 1, -1))

    def _view(self, block: int) -> memoryview:
        at = block % _BLOCKS_AT_ONCE * BLOCK_PAGES
        return self._views[block // _BLOCKS_AT_ONCE][at : at + BLOCK_PAGES]

    def _forget(self, part: memoryview) -> None:
        slots = sorted(slot for slot in part if slot not in (ABSENT, ON_SOURCE))
        part[:] = _NOTHING[: len(part)]
        for position, slot, length in contiguous(slots):
            self._punch(slot, length)
            self._free.extend(slots[position : position + length])
        self.pages -= len(slots)

    def _slot(self) -> int:
        if self._free:
            return self._free.pop()
        self._grow(1)
        return self._end - 1

    def _grow(self, count: int) -> None:
        self._end += count
        self._lengthen(self._end)

    def _lengthen(self, slots: int) -> None:
        if slots > self._size:
            self._size = (slots // _GROW_PAGES + 1) * _GROW_PAGES
            os.ftruncate(self.pages_file, self._size * PAGE_BYTES)

    def _write(self, slot: int, data: memoryview) -> None:
        offset = slot * PAGE_BYTES
        while data:
            written = os.pwrite(self.pages_file, data, offset)
            data, offset = data[written:], offset + written

    def _punch(self, slot: int, count: int) -> None:
        """Free the memory behind slots: MADV_REMOVE on shared memory is a hole in the file (madvise(2))."""
        with mmap.mmap(self.pages_file, count * PAGE_BYTES, offset=slot * PAGE_BYTES) as mapping:
            mapping.madvise(mmap.MADV_REMOVE)


def blocks_of(first: int, count: int, among: Iterable[int] | None = None) -> Iterator[tuple[int, int, int]]:
    """Cut a range of page numbers at the blocks of the index (pure): (block's number, first and end within it).

    With ``among`` only those blocks."""
    last = (first + count - 1) // BLOCK_PAGES
    numbers: Iterable[int] = range(first // BLOCK_PAGES, last + 1)
    if among is not None:
        numbers = [number for number in sorted(among) if first // BLOCK_PAGES <= number <= last]
    for number in numbers:
        base = number * BLOCK_PAGES
        begin, end = max(first - base, 0), min(first + count - base, BLOCK_PAGES)
        if end > begin:
            yield number, begin, end


def contiguous(slots: list[int]) -> Iterator[tuple[int, int, int]]:
    """Split into runs of consecutive slots, of absent ones, or of those on the source (pure): (position in the list,
    first slot, length)."""
    breaks = [
        position
        for position, (here, there) in enumerate(pairwise(slots), 1)
        if not (there == here + 1 and here != ABSENT and there != ON_SOURCE)
        and not (there == here and here in (ABSENT, ON_SOURCE))
    ]
    for begin, end in pairwise([0, *breaks, len(slots)]):
        if end > begin:
            yield begin, slots[begin], end - begin
