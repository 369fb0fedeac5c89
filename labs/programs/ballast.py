"""Memory for a service to carry along: every page has contents of its own that can be checked after a move.

Pages are rewritten in order, round after round, so the contents of each are a function of its number and of
how often it was written. A page is checked before it is rewritten: one that a migration mixed up, lost or
brought back from an earlier round is counted and never forgotten.
"""

from __future__ import annotations

import hashlib
import mmap

PAGE_BYTES = mmap.PAGESIZE


def page_contents(page: int, generation: int) -> bytes:
    """Different for every page and generation, and not compressible to nothing."""
    digest = hashlib.blake2b(page.to_bytes(8, "big") + generation.to_bytes(8, "big")).digest()
    return digest * (PAGE_BYTES // len(digest))


class Ballast:
    """Anonymous memory, private or shared, all of it written at least once."""

    def __init__(self, size_bytes: int, flags: int = mmap.MAP_PRIVATE) -> None:
        self.pages = size_bytes // PAGE_BYTES
        self.wrong_pages = 0
        self._cursor = 0
        self._generation = 0
        self._memory = memoryview(b"")
        if self.pages:
            self._memory = self._map(self.pages * PAGE_BYTES, flags)
            for page in range(self.pages):
                self._write(page, 0)

    def _map(self, size_bytes: int, flags: int) -> memoryview:
        return memoryview(mmap.mmap(-1, size_bytes, flags=flags | mmap.MAP_ANONYMOUS))

    def dirty(self, pages: int) -> None:
        """Check and rewrite the next `pages` pages, going round at the end."""
        for _ in range(min(pages, self.pages)):
            self._check(self._cursor)
            self._write(self._cursor, self._generation + 1)
            self._cursor += 1
            if self._cursor == self.pages:
                self._cursor = 0
                self._generation += 1

    def check_all(self) -> int:
        """Look at every page; return how many were ever found to be wrong (perhaps more than once)."""
        for page in range(self.pages):
            self._check(page)
        return self.wrong_pages

    def _check(self, page: int) -> None:
        start = page * PAGE_BYTES
        written = self._generation + (page < self._cursor)
        if self._memory[start : start + PAGE_BYTES] != page_contents(page, written):
            self.wrong_pages += 1

    def _write(self, page: int, generation: int) -> None:
        start = page * PAGE_BYTES
        self._memory[start : start + PAGE_BYTES] = page_contents(page, generation)
