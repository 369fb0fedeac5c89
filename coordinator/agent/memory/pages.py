"""Reads page contents out of a process, running or frozen, in large batches.

process_vm_readv(2) copies without stopping anything; what it cannot read (memory without read permission, a mapping
that went) is tried page for page through /proc/PID/mem, which may read where the process itself may not. A page that
cannot be read either way has vanished: it is named, and costs nobody else anything.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from coordinator.agent.memory.base import PAGE_BYTES, PageRun

#: Bytes read, sent and stored at once. A kernel that is not preemptible (PREEMPT_NONE, usual on servers) lets nobody in
#: before the end of a system call: with 4 MiB at once the service's clients waited for milliseconds.
BATCH_BYTES = 256 << 10
#: IOV_MAX of Linux (include/uapi/linux/uio.h, UIO_MAXIOV).
_MAX_VECTORS = 1024

_libc = ctypes.CDLL(None, use_errno=True)


class _IoVec(ctypes.Structure):
    """struct iovec (include/uapi/linux/uio.h)."""

    _fields_ = (("base", ctypes.c_uint64), ("length", ctypes.c_uint64))


_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = (
    ctypes.c_int,
    ctypes.POINTER(_IoVec),
    ctypes.c_ulong,
    ctypes.POINTER(_IoVec),
    ctypes.c_ulong,
    ctypes.c_ulong,
)


@dataclass(frozen=True, slots=True)
class PageData:
    """The contents of runs read together: ``data`` is one buffer with the pages of ``runs`` one after the other.

    ``vanished`` are pages that were asked for and are not there any more. ``data`` is valid until the next batch."""

    runs: tuple[PageRun, ...]
    data: memoryview
    vanished: tuple[PageRun, ...]

    def __iter__(self) -> Iterator[tuple[PageRun, memoryview]]:
        """Each run with its own bytes."""
        offset = 0
        for run in self.runs:
            length = run.pages * PAGE_BYTES
            yield run, self.data[offset : offset + length]
            offset += length


def batches(runs: Iterable[PageRun], batch_bytes: int = BATCH_BYTES) -> Iterator[list[PageRun]]:
    """Cut and group runs so that each group fits one read; the order is kept (pure)."""
    limit = max(1, batch_bytes // PAGE_BYTES)
    group: list[PageRun] = []
    pages = 0
    for run in runs:
        start, left = run.start, run.pages
        while left:
            take = min(left, limit - pages)
            group.append(PageRun(start, take))
            start, left, pages = start + take * PAGE_BYTES, left - take, pages + take
            if pages == limit or len(group) == _MAX_VECTORS:
                yield group
                group, pages = [], 0
    if group:
        yield group


def read_pages(pid: int, runs: Iterable[PageRun], batch_bytes: int = BATCH_BYTES) -> Iterator[PageData]:
    """Read runs out of a process, one batch at a time, into one buffer that is used again for each batch.

    A process that is gone yields batches in which everything has vanished. The content of a page is that of some
    instant of the read: of a running process, a page may hold half of a write, which the tracker's next answer
    names."""
    buffer = bytearray(max(PAGE_BYTES, batch_bytes))
    view = memoryview(buffer)
    for group in batches(runs, len(buffer)):
        wanted = sum(run.pages for run in group) * PAGE_BYTES
        if _read_vectors(pid, group, buffer, wanted) == wanted:
            yield PageData(tuple(group), view[:wanted].toreadonly(), ())
        else:
            yield _read_single(pid, group, view)


def _read_vectors(pid: int, group: Sequence[PageRun], buffer: bytearray, wanted: int) -> int:
    """Bytes that one process_vm_readv got; 0 for an error."""
    local = _IoVec(ctypes.addressof(ctypes.c_char.from_buffer(buffer)), wanted)
    remote = (_IoVec * len(group))(*(_IoVec(run.start, run.pages * PAGE_BYTES) for run in group))
    got = _libc.process_vm_readv(pid, ctypes.byref(local), 1, remote, len(group), 0)
    return max(0, int(got))


def _read_single(pid: int, group: Sequence[PageRun], view: memoryview) -> PageData:
    """Run for run, then page for page, through /proc/PID/mem."""
    try:
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return PageData((), view[:0].toreadonly(), tuple(group))
    found: list[PageRun] = []
    vanished: list[PageRun] = []
    offset = 0
    try:
        for run in group:
            address, end = run.start, run.end
            while address < end:
                got = _read_some(memory, view[offset : offset + end - address], address) // PAGE_BYTES
                if got:
                    found.append(PageRun(address, got))
                    address, offset = address + got * PAGE_BYTES, offset + got * PAGE_BYTES
                else:
                    vanished.append(PageRun(address, 1))
                    address += PAGE_BYTES
    finally:
        os.close(memory)
    return PageData(tuple(found), view[:offset].toreadonly(), tuple(_joined(vanished)))


def _read_some(memory: int, target: memoryview, address: int) -> int:
    """Bytes that pread got; 0 if the page at the address cannot be read."""
    try:
        return os.preadv(memory, [target], address)
    except OSError:
        return 0


def _joined(runs: Iterable[PageRun]) -> Iterator[PageRun]:
    last: PageRun | None = None
    for run in runs:
        if last is not None and last.end == run.start:
            last = PageRun(last.start, last.pages + run.pages)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last
