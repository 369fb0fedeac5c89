"""Holds whoever opens one of some files, in the very moment of it (fanotify(7), FAN_OPEN_PERM).

Who opens it waits until we let it in, or are gone: the kernel lets in everybody who waits for a group that is closed.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
from collections.abc import Callable
from pathlib import Path

#: include/uapi/linux/fanotify.h.
_CLASS_CONTENT, _CLOEXEC, _NONBLOCK = 0x4, 0x1, 0x2
_MARK_ADD, _MARK_REMOVE, _OPEN_PERM, _ALLOW = 0x1, 0x2, 0x10000, 0x1
_AT_FDCWD = -100
#: struct fanotify_event_metadata and struct fanotify_response.
_EVENT = struct.Struct("=IBBHQii")
_RESPONSE = struct.Struct("=iI")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_mark.argtypes = (ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p)


class HeldOpen:
    """Holds who opens one of some files. Used by one thread; ``close`` it."""

    def __init__(self, *paths: Path) -> None:
        """Make those of the files that there are not. Raises ``OSError``: ENOSYS or EINVAL where the kernel has no such
        thing (CONFIG_FANOTIFY_ACCESS_PERMISSIONS), EPERM without CAP_SYS_ADMIN."""
        for path in paths:
            path.touch(0o600)
        self._opened = -1
        flags = os.O_RDONLY | os.O_CLOEXEC
        self._group = _checked(int(_libc.fanotify_init(_CLASS_CONTENT | _CLOEXEC | _NONBLOCK, flags)))
        self._paths = [os.fsencode(path) for path in paths]
        try:
            self._mark(_MARK_ADD)
        except OSError:
            self.close()
            raise

    def wait(self, until: int, is_wanted: Callable[[int], bool]) -> int | None:
        """The pid of the first one that is wanted and opens a file: it waits until ``let_in``. Others are let in.

        ``None`` when the descriptor ``until`` becomes readable."""
        poller = select.poll()
        poller.register(until, select.POLLIN)
        poller.register(self._group, select.POLLIN)
        while not any(descriptor == until for descriptor, _ in poller.poll()):
            pid = self._next()
            if pid is not None and is_wanted(pid):
                return pid
            self._allow()
        return None

    def let_in(self) -> None:
        """Let who is held go on, and hold nobody any more. Idempotent."""
        if self._opened >= 0:
            self._mark(_MARK_REMOVE)
            self._allow()
            while self._next() is not None:
                self._allow()

    def close(self) -> None:
        """As ``let_in``. Takes some 15 ms: the kernel waits for all who might look at the mark. Idempotent."""
        for descriptor in (self._opened, self._group):
            if descriptor >= 0:
                os.close(descriptor)
        self._opened = self._group = -1

    def _mark(self, how: int) -> None:
        for path in self._paths:
            _checked(int(_libc.fanotify_mark(self._group, how, _OPEN_PERM, _AT_FDCWD, path)))

    def _next(self) -> int | None:
        """Who opens a file, if anybody does: it waits until ``_allow``."""
        try:
            *_, self._opened, pid = _EVENT.unpack(os.read(self._group, _EVENT.size))
        except BlockingIOError:
            return None
        return int(pid)

    def _allow(self) -> None:
        if self._opened >= 0:
            os.write(self._group, _RESPONSE.pack(self._opened, _ALLOW))
            os.close(self._opened)
            self._opened = -1


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"fanotify: {os.strerror(ctypes.get_errno())}")
    return result
