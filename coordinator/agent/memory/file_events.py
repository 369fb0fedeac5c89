"""Tells of some files that they were opened, or written to past mappings, by anybody: fanotify(7), one mark a file.

That this agent opens them, or a program that it has started, is nothing new to it and is not told: that are our own
looks, and CRIU's, which opens every file that a frozen task has open or mapped (criu/proc_parse.c, vma_get_mapfile;
criu/files-reg.c, store_validation_data_build_id).
"""

from __future__ import annotations

import ctypes
import os
import struct

from coordinator.agent.process import stat_fields

#: include/uapi/linux/fanotify.h. Without a bound of the queue: an event is merged with one of the same kind, of the
#: same process, that has not been read yet.
_CLOEXEC, _NONBLOCK, _UNLIMITED_QUEUE = 0x1, 0x2, 0x10
_MARK_ADD, _MARK_REMOVE = 0x1, 0x2
_MODIFY, _OPEN, _Q_OVERFLOW = 0x2, 0x20, 0x4000
_EVENT = struct.Struct("=IBBHQii")  # struct fanotify_event_metadata
_READ_BYTES = 1 << 14
_PARENT = 1  # of ``stat_fields``

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_mark.argtypes = (ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p)

#: A file by its device and inode, as in stat(2).
Identity = tuple[int, int]


class FileEvents:
    """Watches files. ``close`` it."""

    def __init__(self) -> None:
        """Raises ``OSError``: EPERM without CAP_SYS_ADMIN, ENOSYS where the kernel has no such thing, EMFILE where
        there are too many already (fanotify(7), max_user_groups)."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOATIME
        self._group = int(_libc.fanotify_init(_CLOEXEC | _NONBLOCK | _UNLIMITED_QUEUE, flags))
        if self._group < 0:
            raise OSError(ctypes.get_errno(), f"fanotify: {os.strerror(ctypes.get_errno())}")

    def add(self, descriptor: int) -> None:
        """Watch the file of a descriptor. Raises ``OSError``: ENOSPC where there are too many (max_user_marks)."""
        if _libc.fanotify_mark(self._group, _MARK_ADD, _MODIFY | _OPEN, descriptor, None):
            raise OSError(ctypes.get_errno(), f"fanotify: {os.strerror(ctypes.get_errno())}")

    def remove(self, descriptor: int) -> None:
        """Watch it no more; one that is not watched is passed over."""
        _libc.fanotify_mark(self._group, _MARK_REMOVE, _MODIFY | _OPEN, descriptor, None)

    def take(self) -> set[Identity] | None:
        """The files of which there is something to tell since this was asked last; ``None``: it may be any."""
        found: set[Identity] | None = set()
        ours: dict[int, bool] = {}
        while data := self._read():
            for at in range(0, len(data), _EVENT.size):
                _, _, _, _, mask, descriptor, pid = _EVENT.unpack_from(data, at)
                if descriptor < 0 or mask & _Q_OVERFLOW:
                    found = None
                    continue
                try:
                    status = os.fstat(descriptor)
                finally:
                    os.close(descriptor)
                if pid not in ours:
                    ours[pid] = is_ours(pid)
                if found is not None and not (mask == _OPEN and ours[pid]):
                    found.add((status.st_dev, status.st_ino))
        return found

    def close(self) -> None:
        """Idempotent."""
        if self._group >= 0:
            os.close(self._group)
            self._group = -1

    def _read(self) -> bytes:
        try:
            return os.read(self._group, _READ_BYTES)
        except BlockingIOError:
            return b""


def is_ours(pid: int) -> bool:
    """Whether a process is this one, or a living descendant. Of one that has ended, nobody knows."""
    while pid > 1 and pid != os.getpid():
        fields = stat_fields(pid)
        pid = int(fields[_PARENT]) if fields else 0
    return pid == os.getpid()
