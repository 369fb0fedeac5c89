"""The PAGEMAP_SCAN ioctl (Linux ≥ 6.7): which pages are there, which were written, and protecting those in one go.

Structures and numbers: include/uapi/linux/fs.h; meaning: Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
from collections.abc import Iterator

from coordinator.agent.memory.base import PAGE_BYTES
from coordinator.agent.memory.ptrace import TargetGone
from coordinator.agent.memory.userfault import MemoryReplaced, ioctl_number
from coordinator.errors import TrackingFailed

WPALLOWED, WRITTEN, FILE, PRESENT, SWAPPED, PFNZERO, HUGE, SOFT_DIRTY, GUARD = (1 << bit for bit in range(9))
PM_SCAN_WP_MATCHING, PM_SCAN_CHECK_WPASYNC = 1, 2

_REGIONS = 1 << 14


class PageRegion(ctypes.Structure):
    """struct page_region."""

    _fields_ = (("start", ctypes.c_uint64), ("end", ctypes.c_uint64), ("categories", ctypes.c_uint64))


class ScanArgument(ctypes.Structure):
    """struct pm_scan_arg."""

    _fields_ = (
        ("size", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("walk_end", ctypes.c_uint64),
        ("vec", ctypes.c_uint64),
        ("vec_len", ctypes.c_uint64),
        ("max_pages", ctypes.c_uint64),
        ("category_inverted", ctypes.c_uint64),
        ("category_mask", ctypes.c_uint64),
        ("category_anyof_mask", ctypes.c_uint64),
        ("return_mask", ctypes.c_uint64),
    )


PAGEMAP_SCAN = ioctl_number(3, ord("f"), 16, ctypes.sizeof(ScanArgument))


class Pagemap:
    """/proc/PID/pagemap, open for scanning. It stays with the memory the process had when it was opened."""

    def __init__(self, pid: int) -> None:
        try:
            self.descriptor = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError):
            raise TargetGone(f"process {pid} is gone") from None
        except PermissionError as error:
            raise TrackingFailed(f"process {pid} forbids reading its page map (CAP_SYS_PTRACE)") from error
        self._regions = (PageRegion * _REGIONS)()
        self._words = memoryview(self._regions).cast("B").cast("Q")

    def __enter__(self) -> Pagemap:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def scan(
        self,
        start: int,
        end: int,
        *,
        present: int = 0,
        absent: int = 0,
        any_of: int = 0,
        tell: int = 0,
        protect: bool = False,
    ) -> Iterator[tuple[int, int, int]]:
        """Regions (start, end, categories) of the pages that have all categories ``present``, none of ``absent`` and
        one of ``any_of`` (if given); of the categories only those in ``tell``, and neighbours that agree in them come
        as one.

        Raises ``MemoryReplaced`` if no process has this memory any more.
        With ``protect`` the written ones among them are write-protected in the instant they are found; this skips
        mappings that are not registered for it."""
        while start < end:
            argument = ScanArgument(
                ctypes.sizeof(ScanArgument),
                PM_SCAN_WP_MATCHING if protect else 0,
                start,
                end,
                0,
                ctypes.addressof(self._regions),
                _REGIONS,
                0,
                absent,
                present | absent,
                any_of,
                tell,
            )
            try:
                count = fcntl.ioctl(self.descriptor, PAGEMAP_SCAN, argument)
            except ProcessLookupError as error:
                raise MemoryReplaced from error
            words = self._words[: 3 * count]
            yield from zip(words[0::3].tolist(), words[1::3].tolist(), words[2::3].tolist(), strict=True)
            if argument.walk_end <= start:
                raise TrackingFailed(f"PAGEMAP_SCAN does not get beyond address {start:#x}")
            start = argument.walk_end


@functools.cache
def guard_category() -> int:
    """GUARD where the kernel knows it (Linux ≥ 6.15), else 0. Guard pages hold nothing and cannot be read."""
    with Pagemap(os.getpid()) as pagemap:
        try:
            list(pagemap.scan(PAGE_BYTES, 2 * PAGE_BYTES, absent=GUARD, any_of=PRESENT))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return 0
    return GUARD
