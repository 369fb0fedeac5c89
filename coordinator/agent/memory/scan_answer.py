"""Answers a PAGEMAP_SCAN that CRIU makes, in the kernel's place: the same scan, without the hidden pages.

CRIU scans a task to learn which pages it has to dump (criu/pagemap-cache.c, pmc_fill): a mapping at a time, or some
small ones together, into a vector of at most 32768 regions. Whatever is not exactly that is left to the kernel: scans
of CRIU itself (criu/kerndat.c, check_pagemap), for guard pages (criu/mem.c, collect_madv_guards), of shared memory, of
processes that are not the workload's.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from coordinator.agent.memory.hidden_pages import HiddenPages
from coordinator.agent.memory.pagemap import (
    PAGEMAP_SCAN,
    PRESENT,
    SWAPPED,
    Pagemap,
    PageRegion,
    ScanArgument,
)
from coordinator.agent.memory.runs import Spans
from coordinator.agent.memory.shared_objects import memfd_device
from coordinator.errors import LivemoveError

_ARGUMENT_BYTES = ctypes.sizeof(ScanArgument)
_REGION_BYTES = ctypes.sizeof(PageRegion)
_WALK_END = 32  # offset in struct pm_scan_arg
_WORD = struct.Struct("=Q")
#: The most regions that CRIU asks for (criu/pagemap-cache.c, PAGE_REGIONS_MAX_NR).
_MOST_REGIONS = 32768


class ScanAnswerer:
    """Answers the scans of one dump. Used by one thread; ``close`` it."""

    def __init__(self, hidden: HiddenPages) -> None:
        self._hidden = hidden
        self._processes: dict[tuple[int, str], int | None] = {}
        self._pagemaps: dict[int, Pagemap] = {}
        self._memory = (0, -1)
        self._shared_device = memfd_device()
        self._regions = (PageRegion * _MOST_REGIONS)()

    def close(self) -> None:
        """Close what is open. Idempotent."""
        for pagemap in self._pagemaps.values():
            os.close(pagemap.descriptor)
        self._pagemaps.clear()
        self._open_memory(0)

    def answer(self, scanner: int, descriptor: int, address: int, waits: Callable[[], bool]) -> int | None:
        """The answer to the thread ``scanner`` that stands in ioctl(``descriptor``, PAGEMAP_SCAN, ``address``), written
        into its memory: the number of regions. ``None``: the kernel is to answer.

        ``waits`` tells whether it stands there still, so that its pid has not come to name another. Never raises for
        what can happen to CRIU or to the tasks."""
        with suppress(OSError, LivemoveError):
            pid = self._scanned_process(scanner, descriptor)
            memory = self._open_memory(scanner)
            argument = read_argument(memory, address)
            if pid is None or argument is None or not looks_for_content(argument):
                return None
            visible = self._hidden.visible(pid, argument.start, argument.end)
            if visible is None:
                return None
            count = self._scan(pid, argument, visible) if visible else _nothing(argument)
            if waits() and self._write(memory, address, argument, count):
                return count
        return None

    def is_hidden(self, asker: int, descriptor: int, waits: Callable[[], bool]) -> bool:
        """Whether what the thread ``asker`` has open is a shared object that it is to see as empty. ``waits``: see
        ``answer``."""
        with suppress(OSError):
            status = os.stat(f"/proc/{asker}/fd/{descriptor}")  # noqa: PTH116
            return status.st_dev == self._shared_device and waits() and self._hidden.hides(status.st_ino)
        return False

    def _scanned_process(self, scanner: int, descriptor: int) -> int | None:
        """The process whose page map a descriptor of ``scanner`` is, as numbered here.

        The link has its name in the scanner's own /proc, which may number otherwise: so it is the same file, or
        nobody. That is looked at once for each name, because it takes as long as all the rest."""
        link = f"/proc/{scanner}/fd/{descriptor}"
        name = os.readlink(link)  # noqa: PTH115 - a Path takes as long as the call
        if (scanner, name) not in self._processes:
            *_, number, file = "", *name.split("/")
            same = file == "pagemap" and number.isdigit() and Path(link).samefile(f"/proc/{number}/pagemap")
            self._processes[scanner, name] = int(number) if same else None
        return self._processes[scanner, name]

    def _open_memory(self, scanner: int) -> int:
        """CRIU's memory, opened once: of a process that is gone the descriptor reads nothing, whatever its pid is."""
        known, descriptor = self._memory
        if known != scanner:
            if descriptor >= 0:
                os.close(descriptor)
            self._memory = (0, -1)
            if scanner:
                self._memory = (scanner, os.open(f"/proc/{scanner}/mem", os.O_RDWR | os.O_CLOEXEC))
        return self._memory[1]

    def _scan(self, pid: int, argument: ScanArgument, visible: Spans) -> int:
        """Scan what is visible into our own vector; ``walk_end`` becomes how far that came."""
        room = min(argument.vec_len, _MOST_REGIONS)
        count = 0
        for start, end in visible:
            argument.walk_end = start
            if count == room:
                return count
            part = ScanArgument.from_buffer_copy(argument)
            part.start, part.end = start, end
            part.vec = ctypes.addressof(self._regions) + count * _REGION_BYTES
            part.vec_len = room - count
            count += int(fcntl.ioctl(self._pagemap(pid), PAGEMAP_SCAN, part))
            argument.walk_end = part.walk_end
            if part.walk_end < end:
                return count
        argument.walk_end = argument.end
        return count

    def _pagemap(self, pid: int) -> int:
        if pid not in self._pagemaps:
            self._pagemaps[pid] = Pagemap(pid)
        return self._pagemaps[pid].descriptor

    def _write(self, memory: int, address: int, argument: ScanArgument, count: int) -> bool:
        length = count * _REGION_BYTES
        regions = memoryview(self._regions).cast("B")[:length]
        end = _WORD.pack(argument.walk_end)
        written: int = os.pwrite(memory, regions, argument.vec) + os.pwrite(memory, end, address + _WALK_END)
        return written == length + len(end)


def read_argument(memory: int, address: int) -> ScanArgument | None:
    """The argument of a scan, if there is one of the version that we know."""
    content = os.pread(memory, _ARGUMENT_BYTES, address)
    if len(content) != _ARGUMENT_BYTES:
        return None
    argument = ScanArgument.from_buffer_copy(content)
    return argument if argument.size == _ARGUMENT_BYTES else None


def looks_for_content(argument: ScanArgument) -> bool:
    """Whether a scan asks for pages that have to be dumped, and changes nothing (pure)."""
    plain = (argument.flags, argument.max_pages, argument.category_anyof_mask) == (0, 0, PRESENT | SWAPPED)
    return plain and bool(argument.vec_len)


def _nothing(argument: ScanArgument) -> int:
    argument.walk_end = argument.end
    return 0
