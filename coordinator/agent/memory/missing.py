"""userfaultfd(2) as the one who fills missing pages sees it: its events, and the calls that answer them.

Structures and numbers: include/uapi/linux/userfaultfd.h; meaning: Documentation/admin-guide/mm/userfaultfd.rst. CRIU
has made the descriptor, chosen its features (fork, remap, remove, unmap) and registered the memory.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

#: _IOWR(0xAA, 3, 40 bytes), _IOWR(0xAA, 4, 32 bytes), _IOR(0xAA, 2, 16 bytes).
_COPY, _ZEROPAGE, _WAKE = 0xC028AA03, 0xC020AA04, 0x8010AA02
_MESSAGE = struct.Struct("=B7xQQQ")
_PAGEFAULT, _FORK, _REMAP, _REMOVE, _UNMAP = range(0x12, 0x17)
_MESSAGES_AT_ONCE = 64

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.restype = ctypes.c_int
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)


class _Copy(ctypes.Structure):
    """struct uffdio_copy."""

    _fields_ = (
        ("to", ctypes.c_uint64),
        ("source", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("done", ctypes.c_int64),
    )


class _ZeroPage(ctypes.Structure):
    """struct uffdio_zeropage."""

    _fields_ = (
        ("start", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("done", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class Fault:
    """A task waits for this page number."""

    page: int


@dataclass(frozen=True, slots=True)
class Fork:
    """A child has the same memory, with the same pages missing; its descriptor."""

    descriptor: int


@dataclass(frozen=True, slots=True)
class Remap:
    """Pages were moved (mremap(2))."""

    start: int
    to: int
    count: int


@dataclass(frozen=True, slots=True)
class Remove:
    """Pages were unmapped or given back (munmap(2), MADV_DONTNEED): what they held is not wanted any more."""

    start: int
    end: int


Event = Fault | Fork | Remap | Remove


def read_events(descriptor: int) -> list[Event]:
    """What has happened; whoever caused an event other than a fault goes on when it is read. Never waits."""
    try:
        data = os.read(descriptor, _MESSAGES_AT_ONCE * _MESSAGE.size)
    except BlockingIOError:
        return []
    return [_event(*fields) for fields in _MESSAGE.iter_unpack(data)]


def _event(kind: int, first: int, second: int, third: int) -> Event:
    if kind == _PAGEFAULT:  # flags, address
        return Fault(second // PAGE_BYTES)
    if kind == _FORK:
        return Fork(first & 0xFFFF_FFFF)
    if kind == _REMAP:
        return Remap(first // PAGE_BYTES, second // PAGE_BYTES, third // PAGE_BYTES)
    if kind in (_REMOVE, _UNMAP):
        return Remove(first // PAGE_BYTES, second // PAGE_BYTES)
    raise ValueError(f"userfaultfd event {kind:#x}")


def copy(descriptor: int, page: int, source: int, count: int) -> tuple[int, int]:
    """Fill ``count`` missing pages from our address ``source``, and wake who waits for them.

    Returns how many were filled, and the errno of what came in the way of the next one: EEXIST it is there; EAGAIN an
    event is to be read first; ENOENT the pages are not (all) in one registered mapping; ESRCH, ENOSPC the process has
    ended (ENOSPC before Linux 5.0); 0."""
    request = _Copy(page * PAGE_BYTES, source, count * PAGE_BYTES, 0, 0)
    failed = _libc.ioctl(descriptor, _COPY, ctypes.byref(request)) < 0
    return max(0, request.done) // PAGE_BYTES, ctypes.get_errno() if failed else 0


def zero(descriptor: int, page: int, count: int) -> tuple[int, int]:
    """As ``copy``, with zeroes."""
    request = _ZeroPage(page * PAGE_BYTES, count * PAGE_BYTES, 0, 0)
    failed = _libc.ioctl(descriptor, _ZEROPAGE, ctypes.byref(request)) < 0
    return max(0, request.done) // PAGE_BYTES, ctypes.get_errno() if failed else 0


def wake(descriptor: int, page: int) -> None:
    """Have who waits for a page look again. Of a mapping that went there is nobody left to wake."""
    _libc.ioctl(descriptor, _WAKE, struct.pack("=QQ", page * PAGE_BYTES, PAGE_BYTES))
