"""Tells of holes that are punched into System V segments (inotify(7)), which no page table does.

MADV_REMOVE takes pages out of a shared object and out of all page tables. Where one had the mark "not written", the
kernel leaves it at the address, and puts it on the empty page that comes in when somebody reads there (mm/memory.c,
pte_install_uffd_wp_if_needed). So the page looks as if it had never been written.

To inotify a hole is a write like one through a descriptor (mm/madvise.c, madvise_remove); writes through mappings are
not. From Linux 6.14 on the kernel says nothing of objects that have no name, but does so of segments, whose descriptor
is made in another way (ipc/shm.c, do_shmat; fs/file_table.c, alloc_file_clone). ``holes_are_told`` tries it.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from contextlib import closing

from coordinator.agent.memory.base import PAGE_BYTES
from coordinator.agent.memory.mappings import read_mappings

#: include/uapi/linux/inotify.h, ipc.h, mman.h.
_MODIFY, _IGNORED = 0x2, 0x8000
_EVENT = struct.Struct("=iIII")  # struct inotify_event
_IPC_PRIVATE, _IPC_RMID, _MADV_REMOVE = 0, 0, 9

_libc = ctypes.CDLL(None, use_errno=True)
_libc.shmget.argtypes = (ctypes.c_int, ctypes.c_size_t, ctypes.c_int)
_libc.shmat.restype = ctypes.c_void_p
_libc.shmat.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_libc.shmdt.argtypes = (ctypes.c_void_p,)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class HoleWatch:
    """Watches segments of one IPC namespace. ``close`` it."""

    def __init__(self) -> None:
        """Raises ``OSError``: EMFILE where this user has too many already (inotify(7), max_user_instances)."""
        self._watched: dict[int, int] = {}  # inotify's number of a watch → the segment's id
        self._descriptor = _checked(int(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)))

    def watch(self, wanted: Iterable[int], pids: Iterable[int]) -> frozenset[int]:
        """Watch those of the wanted segments that a process has attached; return all that are watched by now."""
        missing = set(wanted) - set(self._watched.values())
        for pid in pids if missing else ():
            for mapping in read_mappings(pid):
                if mapping.segment in missing:
                    path = f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"
                    number = int(_libc.inotify_add_watch(self._descriptor, path.encode(), _MODIFY))
                    if number >= 0:  # else it is gone already
                        self._watched[number] = mapping.segment
                        missing.remove(mapping.segment)
        return frozenset(self._watched.values())

    def punched(self) -> frozenset[int]:
        """The segments into which a hole was punched since this was asked last, or that are gone."""
        found: set[int] = set()
        while data := self._read():
            at = 0
            while at < len(data):
                number, what, _, length = _EVENT.unpack_from(data, at)
                at += _EVENT.size + length
                # An overflow has the number -1: it may be any of them.
                found.update([self._watched[number]] if number in self._watched else self._watched.values())
                if what & _IGNORED:
                    self._watched.pop(number, None)
        return frozenset(found)

    def close(self) -> None:
        """Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _read(self) -> bytes:
        try:
            return os.read(self._descriptor, 1 << 16)
        except BlockingIOError:
            return b""


def holes_are_told() -> bool:
    """Whether this kernel tells of a hole in a segment: one of our own is made, punched and removed (some 0.2 ms).

    Raises ``OSError`` where there can be no segment."""
    segment = _checked(int(_libc.shmget(_IPC_PRIVATE, PAGE_BYTES, 0o600)))
    start = _libc.shmat(segment, None, 0)
    _libc.shmctl(segment, _IPC_RMID, None)  # it goes when it is detached
    if start is None or start == ctypes.c_void_p(-1).value:
        return False
    try:
        with closing(HoleWatch()) as watch:
            watch.watch([segment], [os.getpid()])
            ctypes.memset(start, 1, PAGE_BYTES)
            quiet = not watch.punched()
            _libc.madvise(start, PAGE_BYTES, _MADV_REMOVE)
            return quiet and watch.punched() == {segment}
    finally:
        _libc.shmdt(start)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
