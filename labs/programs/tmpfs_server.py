"""The pattern service with all its memory in one file of /dev/shm, as shm_open(3) makes one: mapped, and closed."""

from __future__ import annotations

import ctypes
import mmap
import os

from labs.programs import pattern_server
from labs.programs.ballast import Ballast
from labs.programs.memory_regions import fresh_mapping

FILE = "/dev/shm/ballast"


class File(Ballast):
    """A mapping without a descriptor; Python's own keeps one."""

    def _map(self, size_bytes: int, flags: int) -> memoryview:
        descriptor = os.open(FILE, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(descriptor, size_bytes)
        address = fresh_mapping(size_bytes // mmap.PAGESIZE, mmap.MAP_SHARED, descriptor)
        os.close(descriptor)
        return memoryview((ctypes.c_char * size_bytes).from_address(address)).cast("B")


def main() -> None:
    options = pattern_server.arguments().parse_args()
    pattern_server.serve(options, lambda: File(options.memory_mb * pattern_server.MEGABYTE))


if __name__ == "__main__":
    main()
