"""The memory service with a System V segment, which CRIU moves only with its IPC namespace: for containers.

The process that listens has it attached for writing, and once more for reading. One worker has it attached twice, and
writes through both; the other is a visitor: from the first check of all memory on it attaches the segment every
`VISIT_EVERY_S`, writes to it, punches a hole into it and detaches. Children that come and go do not have it, so their
coming and going says nothing of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from labs.programs import pattern_server
from labs.programs.ballast import PAGE_BYTES
from labs.programs.memory_regions import Changing, Region, Segment
from labs.programs.memory_server import WORKERS, Family, Memory

VISIT_EVERY_S = 1.0
LISTENER, WORKER, VISITOR = range(WORKERS + 1)


class SegmentMemory(Memory):
    """Most of the pages are in the segment."""

    def __init__(self, pages: int) -> None:
        self._segment = Segment(7, pages - pages // 16)
        self._segment.attach(read_only=True)
        self._addresses = [self._segment.attach()]
        super().__init__(pages // 16)
        with self._attached():
            for page in range(self._segment.pages):
                self._segment.write(page, self._serials)

    def becomes(self, process: int) -> None:
        """See `Memory`: the attachments of who it was are not those of a child."""
        super().becomes(process)
        self._visits = process == VISITOR
        self._visited = math.inf
        self._segment.mine = range(process, self._segment.pages, WORKERS + 1)
        if process != LISTENER:
            self._addresses = [self._segment.attach() for _ in range(2) if process == WORKER]

    def dirty(self, pages: int) -> None:
        """See `Memory`."""
        super().dirty(pages)
        if self._visits and time.monotonic() - self._visited < VISIT_EVERY_S:
            return
        with self._attached():
            for _ in range(pages):
                self._segment.address = self._random.choice(self._addresses)
                self._segment.write(self.choose(self._segment), self._serials)
            if self._visits:
                self._segment.punch(self.choose(self._segment))

    def check_all(self) -> None:
        """See `Memory`."""
        with self._attached():
            super().check_all()

    @contextmanager
    def _attached(self) -> Iterator[None]:
        if self._visits:
            self._addresses = [self._segment.attach()]
        self._segment.address = self._addresses[-1]
        yield
        if self._visits:
            self._segment.detach()
            self._visited = time.monotonic()

    def _all(self) -> list[Region | Changing]:
        return [*super()._all(), self._segment]


def main() -> None:
    options = pattern_server.arguments().parse_args()
    pages = options.memory_mb * pattern_server.MEGABYTE // PAGE_BYTES
    pattern_server.serve(options, lambda: Family(SegmentMemory(pages)))


if __name__ == "__main__":
    main()
