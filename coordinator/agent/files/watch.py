"""Asks the kernel which entries of a directory tree change: fanotify(7), with a mark on the tree's file system.

An event names a directory by its file handle, and an entry in it (FAN_REPORT_DFID_NAME, Linux ≥ 5.9). The handle is
opened when the event is looked at, so that the path is that of this moment, however often the directory was renamed.
Writes through a mapping make no events until the file is closed; see ``in_use.py``.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

_FAN_CLOEXEC, _FAN_NONBLOCK = 0x1, 0x2
_FAN_REPORT_DIR_FID, _FAN_REPORT_NAME = 0x400, 0x800
_FAN_MARK_ADD, _FAN_MARK_FILESYSTEM = 0x1, 0x100
_FAN_MODIFY, _FAN_ATTRIB, _FAN_CLOSE_WRITE = 0x2, 0x4, 0x8
_FAN_MOVED_FROM, _FAN_MOVED_TO, _FAN_CREATE, _FAN_DELETE = 0x40, 0x80, 0x100, 0x200
_FAN_Q_OVERFLOW, _FAN_ONDIR = 0x4000, 0x4000_0000
_MASK = (
    _FAN_MODIFY
    | _FAN_ATTRIB
    | _FAN_CLOSE_WRITE
    | _FAN_MOVED_FROM
    | _FAN_MOVED_TO
    | _FAN_CREATE
    | _FAN_DELETE
    | _FAN_ONDIR
)
_INFO_DFID_NAME = 2
_AT_FDCWD = -100
#: struct fanotify_event_metadata; struct fanotify_event_info_header with the fsid; struct file_handle.
_EVENT, _INFO, _HANDLE = struct.Struct("=IBBHQii"), struct.Struct("=BBH8s"), struct.Struct("=Ii")
_READ_BYTES = 1 << 18
#: Entries that are remembered; with more, looking at everything is no longer than looking at each.
_MOST = 200_000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_mark.argtypes = (ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p)


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened to the entry ``name`` of the directory with that handle, or to the directory itself (".").
    ``whole``: a directory has come, with everything that is in it. ``other``: there may have been another directory of
    that name before, of which nothing must be left."""

    handle: bytes
    name: bytes
    whole: bool
    other: bool


@dataclass(frozen=True, slots=True)
class Changed:
    """A path within the tree of that number; see ``Event``."""

    tree: int
    path: str
    whole: bool = False
    other: bool = False


class Watch:
    """Everything that happens to some trees from its making on. ``OSError`` where the kernel or the file system has no
    such events."""

    def __init__(self, trees: Sequence[str]) -> None:
        self._lost = False
        self._events: set[Event] = set()
        flags = _FAN_CLOEXEC | _FAN_NONBLOCK | _FAN_REPORT_DIR_FID | _FAN_REPORT_NAME
        self._descriptor = _checked(_libc.fanotify_init(flags, os.O_RDONLY | os.O_CLOEXEC), "fanotify_init")
        self._roots: list[tuple[str, int]] = []
        try:
            for tree in trees:
                self._roots.append((os.path.realpath(tree), os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)))
                path = os.fsencode(tree)
                what = _FAN_MARK_ADD | _FAN_MARK_FILESYSTEM
                marked = _libc.fanotify_mark(self._descriptor, what, _MASK, _AT_FDCWD, path)
                _checked(marked, f"fanotify_mark on {tree}")
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """Readable when something has happened."""
        return self._descriptor

    def read(self) -> None:
        """Take what has happened out of the kernel's queue. Never waits."""
        with suppress(BlockingIOError):
            while data := os.read(self._descriptor, _READ_BYTES):
                events = parse(data)
                self._lost = self._lost or events is None or len(self._events) > _MOST
                if self._lost:
                    self._events.clear()
                else:
                    self._events.update(events or ())

    def take(self) -> list[Changed] | None:
        """What has happened within the trees since the last time, by the paths of now, and forget it. ``None`` if there
        was too much at once, so that nothing is known."""
        self.read()
        events, self._events = self._events, set()
        if self._lost:
            self._lost = False
            return None
        folders: dict[bytes, tuple[int, str] | None] = {}
        found = []
        for event in events:
            if event.handle not in folders:
                folders[event.handle] = self._folder(event.handle)
            if (folder := folders[event.handle]) is not None:
                name = os.fsdecode(event.name)
                path = folder[1] if name == "." else name if folder[1] == "." else f"{folder[1]}/{name}"
                found.append(Changed(folder[0], path, event.whole, event.other))
        return found

    def close(self) -> None:
        """Stop watching. Idempotent."""
        for _, descriptor in self._roots:
            os.close(descriptor)
        self._roots.clear()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _folder(self, handle: bytes) -> tuple[int, str] | None:
        """The tree and path of a directory; ``None`` if it is gone, or in no tree. A path that is only the same by name
        (below another mount) is not the directory's."""
        for number, (root, descriptor) in enumerate(self._roots):
            opened = _libc.open_by_handle_at(descriptor, handle, os.O_PATH | os.O_CLOEXEC)
            if opened < 0:
                continue  # ESTALE: it is gone, which an event of its parent says; or another file system's
            try:
                path = os.readlink(f"/proc/self/fd/{opened}")  # noqa: PTH115 - no text needed of it
                if (path == root or path.startswith(f"{root.rstrip('/')}/")) and _is_same(path, opened):
                    return number, os.path.relpath(path, root)
            finally:
                os.close(opened)
        return None


def parse(data: bytes) -> set[Event] | None:
    """The events in what was read (pure); ``None`` if the queue has overflowed."""
    found = set()
    offset = 0
    while offset < len(data):
        length, _, _, header, mask, _, _ = _EVENT.unpack_from(data, offset)
        if mask & _FAN_Q_OVERFLOW:
            return None
        at = offset + header
        while at < offset + length:
            kind, _, size, _ = _INFO.unpack_from(data, at)
            if kind == _INFO_DFID_NAME:
                begin = at + _INFO.size
                end = begin + _HANDLE.size + _HANDLE.unpack_from(data, begin)[0]
                name = data[end : at + size].partition(b"\0")[0]
                whole = bool(mask & _FAN_ONDIR and mask & (_FAN_CREATE | _FAN_MOVED_TO))
                other = bool(mask & _FAN_ONDIR and mask & (_FAN_DELETE | _FAN_MOVED_FROM | _FAN_MOVED_TO))
                found.add(Event(data[begin:end], name, whole, other))
            at += size
        offset += length
    return found


def _is_same(path: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except OSError:
        return False


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result
