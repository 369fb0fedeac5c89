"""Scans page maps as CRIU does, for tests: a program that is put under a filter.

Run as ``python3 scanner.py IMAGE REPEATS SCAN…``, with a FIFO ``go`` beside the image, and each scan as words: pid,
start, end, length of the vector, and categories of which a page is to have one. When the FIFO has been opened it
opens the image, scans, and prints a JSON list with, for each scan, its regions from start to end, however many calls it
takes, or the errno."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import sys
from pathlib import Path

from coordinator.agent.memory.pagemap import (
    FILE,
    PAGEMAP_SCAN,
    PFNZERO,
    PRESENT,
    SOFT_DIRTY,
    SWAPPED,
    PageRegion,
    ScanArgument,
)

CONTENT = PRESENT | SWAPPED


def scan(pid: int, start: int, end: int, vec_len: int, any_of: int = CONTENT) -> list[tuple[int, int, int]] | int:
    """The regions of a range, with CRIU's categories (criu/pagemap-cache.c, pmc_fill)."""
    regions = (PageRegion * vec_len)()
    found: list[tuple[int, int, int]] = []
    descriptor = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
    try:
        while start < end:
            argument = ScanArgument(
                ctypes.sizeof(ScanArgument),
                0,
                start,
                end,
                0,
                ctypes.addressof(regions),
                vec_len,
                0,
                PFNZERO | FILE,
                PFNZERO | FILE,
                any_of,
                PRESENT | SWAPPED | SOFT_DIRTY,
            )
            count = fcntl.ioctl(descriptor, PAGEMAP_SCAN, argument)
            found += [(each.start, each.end, each.categories) for each in regions[:count]]
            assert start < argument.walk_end <= end
            start = argument.walk_end
    except OSError as error:
        return error.errno or -1
    finally:
        os.close(descriptor)
    return found


def main(image: Path, repeats: int, *scans: str) -> None:
    """See the module."""
    image.with_name("go").read_bytes()
    image.write_bytes(b"")
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.siginterrupt(signal.SIGALRM, False)  # or a call that nobody has begun to answer ends with EINTR
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0003)  # answers arrive whatever signals come
    numbers = [tuple(int(number) for number in each.split()) for each in scans]
    found = [scan(*each) for each in numbers * repeats]
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
