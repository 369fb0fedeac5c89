"""The page store of a migration on the destination: one memory file, one slot of it for each page it holds.

Pages arrive in rounds, in any order and more than once; the last one wins. A page that was discarded on the source is
dropped here too, or it would come back with its old content. Pages that were never sent cost nothing: they are zero.
The index is a dictionary for each process, about 100 bytes a page (2.5 %) beside the pages themselves.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from itertools import pairwise

PAGE_BYTES = mmap.PAGESIZE

#: The memory file's mapping grows in steps of this many pages (64 MiB of 4 KiB pages); unused ones are never touched.
_GROW_PAGES = 16384


class PageStore:
    """Pages by (pid, page number). ``pid`` is the one in CRIU's images: that of the innermost pid namespace."""

    def __init__(self) -> None:
        self._file = os.memfd_create("livemove-pages", os.MFD_CLOEXEC)
        self._index: dict[int, dict[int, int]] = {}
        self._free: list[int] = []
        self._end = 0
        self._size = 0

    @property
    def pages(self) -> int:
        """How many pages are held."""
        return sum(len(index) for index in self._index.values())

    def put(self, pid: int, start: int, data: bytes | memoryview) -> None:
        """Store the pages from address ``start``; ``data`` is a whole number of pages, and replaces older content.

        Raises ``OSError`` (ENOMEM, ENOSPC) if the host has no memory left."""
        first, count = start // PAGE_BYTES, len(data) // PAGE_BYTES
        if start % PAGE_BYTES or len(data) % PAGE_BYTES:
            raise ValueError(f"{len(data)} bytes at {start:#x} are no whole pages")
        index = self._index.setdefault(pid, {})
        numbers = range(first, first + count)
        if not self._free and index.keys().isdisjoint(numbers):
            slots = list(range(self._end, self._end + count))
            self._grow(count)
        else:
            slots = [self._slot(index, number) for number in numbers]
        view = memoryview(data)
        for position, slot, length in _contiguous(slots):
            self._write(slot, view[position * PAGE_BYTES : (position + length) * PAGE_BYTES])
        # Last, because the page server's thread may look at any time: what the index names is there.
        index.update(zip(numbers, slots, strict=True))

    def drop(self, pid: int, start: int, pages: int) -> None:
        """Forget pages and give their memory back; those that are not held are passed over."""
        index = self._index.get(pid, {})
        first = start // PAGE_BYTES
        if pages > len(index):
            numbers = [number for number in index if first <= number < first + pages]
        else:
            numbers = [number for number in range(first, first + pages) if number in index]
        slots = sorted(index.pop(number) for number in numbers)
        for position, slot, length in _contiguous(slots):
            self._punch(slot, length)
            self._free.extend(slots[position : position + length])

    def drop_process(self, pid: int) -> None:
        """Forget all pages of a process that is gone."""
        slots = sorted(self._index.pop(pid, {}).values())
        for position, slot, length in _contiguous(slots):
            self._punch(slot, length)
            self._free.extend(slots[position : position + length])

    def holds(self, pid: int, start: int) -> bool:
        """Whether the page at that address is held."""
        return start // PAGE_BYTES in self._index.get(pid, {})

    def read(self, pid: int, start: int, pages: int) -> bytes:
        """The content of consecutive pages; pages that are not held are zero."""
        index = self._index.get(pid, {})
        first = start // PAGE_BYTES
        slots = [index.get(number, -1) for number in range(first, first + pages)]
        parts = [
            os.pread(self._file, length * PAGE_BYTES, slot * PAGE_BYTES) if slot >= 0 else bytes(length * PAGE_BYTES)
            for _, slot, length in _contiguous(slots)
        ]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Give all memory back. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._index.clear()
        self._free.clear()

    def _slot(self, index: dict[int, int], number: int) -> int:
        slot = index.get(number)
        if slot is None:
            if self._free:
                slot = self._free.pop()
            else:
                slot = self._end
                self._grow(1)
        return slot

    def _grow(self, count: int) -> None:
        self._end += count
        if self._end > self._size:
            self._size = (self._end // _GROW_PAGES + 1) * _GROW_PAGES
            os.ftruncate(self._file, self._size * PAGE_BYTES)

    def _write(self, slot: int, data: memoryview) -> None:
        offset = slot * PAGE_BYTES
        while data:
            written = os.pwrite(self._file, data, offset)
            data, offset = data[written:], offset + written

    def _punch(self, slot: int, count: int) -> None:
        """Free the memory behind slots: MADV_REMOVE on shared memory is a hole in the file (madvise(2))."""
        with mmap.mmap(self._file, count * PAGE_BYTES, offset=slot * PAGE_BYTES) as mapping:
            mapping.madvise(mmap.MADV_REMOVE)


def _contiguous(slots: list[int]) -> Iterator[tuple[int, int, int]]:
    """Split into runs of consecutive slots, or of absent ones (-1): (position in the list, first slot, length)."""
    breaks = [
        position
        for position, (here, there) in enumerate(pairwise(slots), 1)
        if not (there == here + 1 and here >= 0) and not (here < 0 and there < 0)
    ]
    for begin, end in pairwise([0, *breaks, len(slots)]):
        if end > begin:
            yield begin, slots[begin], end - begin
