"""The pattern service with all its memory in one memfd that is mapped, and keeps its descriptor.

Every other page is written through the descriptor, which no page table tells; when the service checks itself, each is
read through both.
"""

from __future__ import annotations

import mmap
import os

from labs.programs import pattern_server
from labs.programs.ballast import PAGE_BYTES, Ballast, page_contents


class Memfd(Ballast):
    """A mapping and a descriptor of the same memory."""

    def _map(self, size_bytes: int, flags: int) -> memoryview:
        self._descriptor = os.memfd_create("ballast")
        os.ftruncate(self._descriptor, size_bytes)
        return memoryview(mmap.mmap(self._descriptor, size_bytes, flags=mmap.MAP_SHARED))

    def check_all(self) -> int:
        super().check_all()
        for page in range(self.pages):
            start = page * PAGE_BYTES
            through = os.pread(self._descriptor, PAGE_BYTES, start)
            self.wrong_pages += through != self._memory[start : start + PAGE_BYTES]
        return self.wrong_pages

    def _write(self, page: int, generation: int) -> None:
        if page % 2:
            os.pwrite(self._descriptor, page_contents(page, generation), page * PAGE_BYTES)
        else:
            super()._write(page, generation)


def main() -> None:
    options = pattern_server.arguments().parse_args()
    pattern_server.serve(options, lambda: Memfd(options.memory_mb * pattern_server.MEGABYTE))


if __name__ == "__main__":
    main()
