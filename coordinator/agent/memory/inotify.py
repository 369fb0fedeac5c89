"""inotify(7), as much of it as is used here: watches of single files, and what they tell."""

from __future__ import annotations

import ctypes
import os
import struct

#: include/uapi/linux/inotify.h.
MODIFY, OPEN, IGNORED = 0x2, 0x20, 0x8000
#: The number of the watch in an event that tells of a queue too full to tell more.
OVERFLOW = -1
_EVENT = struct.Struct("=iIII")  # struct inotify_event

_libc = ctypes.CDLL(None, use_errno=True)


class Inotify:
    """Watches of one instance, by number. ``close`` it."""

    def __init__(self) -> None:
        """Raises ``OSError``: EMFILE where this user has too many already (inotify(7), max_user_instances)."""
        self._descriptor = int(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def add(self, path: str, events: int) -> int:
        """The number of a new watch of the file that ``path`` leads to. Raises ``OSError``: ENOENT where there is none,
        ENOSPC where this user has too many watches (max_user_watches)."""
        number = int(_libc.inotify_add_watch(self._descriptor, path.encode(), events))
        if number < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return number

    def remove(self, number: int) -> None:
        """End a watch; one that has ended is passed over."""
        _libc.inotify_rm_watch(self._descriptor, number)

    def events(self) -> list[tuple[int, int]]:
        """What was told since this was asked last: the watch's number, or OVERFLOW, and what happened."""
        found: list[tuple[int, int]] = []
        while data := self._read():
            at = 0
            while at < len(data):
                number, what, _, length = _EVENT.unpack_from(data, at)
                found.append((number, what))
                at += _EVENT.size + length
        return found

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
