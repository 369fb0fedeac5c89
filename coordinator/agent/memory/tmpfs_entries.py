"""What is in a tmpfs, as a list: made on the source from the frozen workload's, and put into another one on the
destination.

A list is JSON, in pieces of at most some megabytes, each with the contents of its small files behind it. A large file
comes on its own, as pages (``tmpfs_files``), and is in the list by its number. Folders stand before what is in them; a
file with several names has its content at the first, and is linked at the others.

As with CRIU, which has tar do this, sockets are left out, for CRIU binds them again (criu/sk-unix.c). Unlike tar with
CRIU's options, times are told to the nanosecond, and extended attributes go along, but for labels (security.selinux),
which are the policy's of a host.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from coordinator.errors import ProtocolError

#: A file of this size or more comes as pages: below, it is sent as fast as it is compared.
LARGE_BYTES = 1 << 20
#: How much content is put behind one list.
_BATCH_BYTES, _BATCH_ENTRIES = 1 << 20, 2000
_NOT_MOVED = ("security.selinux",)
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: Every descriptor below leads to the file that was looked at, or nowhere; reading leaves no trace in its times.
OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Found:
    """A file of a tmpfs: the path below its root, of names; empty for the root itself."""

    path: tuple[str, ...]
    status: os.stat_result

    @property
    def large(self) -> bool:
        """Whether it comes as pages."""
        return stat.S_ISREG(self.status.st_mode) and self.status.st_size >= LARGE_BYTES


def walk(root: int) -> Iterator[Found]:
    """All files of the tmpfs whose root is open under that descriptor, folders before what is in them; what goes
    meanwhile is left out. Raises ``OSError`` (EXDEV) where another file system is mounted below."""
    yield Found((), os.fstat(root))
    yield from _walk(root, os.fstat(root).st_dev, ())


def _walk(folder: int, device: int, above: tuple[str, ...]) -> Iterator[Found]:
    for name in sorted(os.listdir(folder)):
        try:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            continue
        if status.st_dev != device:
            raise OSError(errno.EXDEV, "something is mounted below a tmpfs", "/".join((*above, name)))
        yield Found((*above, name), status)
        if stat.S_ISDIR(status.st_mode):
            try:
                inner = os.open(name, _OPEN_FOLDER | os.O_NOATIME, dir_fd=folder)
            except (FileNotFoundError, NotADirectoryError):
                continue
            try:
                yield from _walk(inner, device, (*above, name))
            finally:
                os.close(inner)


class Folders:
    """Opens the folders below the root that is open under a descriptor, one at a time, with no symbolic link on the
    way. ``close`` it."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._path: tuple[str, ...] = ()
        self._opened = -1

    def of(self, path: Sequence[str]) -> int:
        """A descriptor of the folder that has the last name of a path; valid until the next one is asked for."""
        if not path[:-1]:
            return self._root
        if tuple(path[:-1]) != self._path:
            self.close()
            for name in path[:-1]:
                above = self._opened if self._opened >= 0 else self._root
                inner = os.open(name, _OPEN_FOLDER, dir_fd=above)
                self.close()
                self._opened = inner
            self._path = tuple(path[:-1])
        return self._opened

    def file(self, path: Sequence[str]) -> str:
        """A path that leads to a file itself, for calls that take no descriptor; valid as long."""
        return f"/proc/self/fd/{self.of(path)}/{path[-1]}" if path else f"/proc/self/fd/{self._root}"

    def close(self) -> None:
        """Idempotent."""
        if self._opened >= 0:
            os.close(self._opened)
        self._opened, self._path = -1, ()


def open_file(folders: Folders, found: Found) -> int:
    """A descriptor for reading the file that was found. Raises ``OSError`` (ENOENT) where another one is there now."""
    descriptor = os.open(found.path[-1], OPEN_FILE, dir_fd=folders.of(found.path))
    if (here := os.fstat(descriptor)).st_ino != found.status.st_ino or not stat.S_ISREG(here.st_mode):
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, "another file has come in its place", "/".join(found.path))
    return descriptor


def listed(root: int, found: Iterable[Found], numbers: Mapping[int, int]) -> Iterator[tuple[bytes, bytes]]:
    """Lists of what was found, and the contents behind each; of the large files the ``numbers``, by inode.

    The workload stands still. Raises ``OSError``."""
    first: dict[int, tuple[str, ...]] = {}
    entries: list[dict[str, Any]] = []
    contents: list[bytes] = []
    with closing(Folders(root)) as folders:
        for each in found:
            inode, mode = each.status.st_ino, each.status.st_mode
            if stat.S_ISSOCK(mode):
                continue
            if inode in first and not stat.S_ISDIR(mode):
                entries.append({"kind": "link", "path": each.path, "to": first[inode]})
            else:
                first[inode] = each.path
                entries.append({"path": each.path, **_dressed(folders, each), **_content(folders, each, numbers)})
                if entries[-1]["kind"] == "file":
                    contents.append(_read(folders, each))
            if len(entries) >= _BATCH_ENTRIES or sum(map(len, contents)) >= _BATCH_BYTES:
                yield json.dumps(entries).encode(), b"".join(contents)
                entries, contents = [], []
    yield json.dumps(entries).encode(), b"".join(contents)


def _dressed(folders: Folders, each: Found) -> dict[str, Any]:
    status, here, follow = each.status, folders.file(each.path), not each.path
    attributes = [name for name in os.listxattr(here, follow_symlinks=follow) if name not in _NOT_MOVED]
    values = {name: os.getxattr(here, name, follow_symlinks=follow) for name in attributes}
    return {
        "mode": stat.S_IMODE(status.st_mode),
        "owner": (status.st_uid, status.st_gid),
        "times": (status.st_atime_ns, status.st_mtime_ns),
        "size": status.st_size,
        "attributes": {name: base64.b64encode(value).decode() for name, value in values.items()},
    }


def _content(folders: Folders, each: Found, numbers: Mapping[int, int]) -> dict[str, Any]:
    mode = each.status.st_mode
    if stat.S_ISDIR(mode):
        return {"kind": "folder"}
    if stat.S_ISLNK(mode):
        return {"kind": "symlink", "to": os.readlink(each.path[-1], dir_fd=folders.of(each.path))}
    if not stat.S_ISREG(mode):
        return {"kind": "node", "type": stat.S_IFMT(mode), "device": each.status.st_rdev}
    return {"kind": "pages", "number": numbers[each.status.st_ino]} if each.large else {"kind": "file"}


def _read(folders: Folders, each: Found) -> bytes:
    descriptor = open_file(folders, each)
    try:
        return os.pread(descriptor, each.status.st_size, 0)
    finally:
        os.close(descriptor)


class Maker:
    """Puts lists into the empty tmpfs whose root is open under a descriptor. ``pages``: the file of a number, which has
    no name yet (open(2), O_TMPFILE)."""

    def __init__(self, root: int, pages: Callable[[int], int]) -> None:
        self._root = root
        self._pages = pages
        self._made: list[dict[str, Any]] = []

    def put(self, entries: bytes, contents: memoryview) -> None:
        """Make what is on a list. Raises ``OSError``, and ``ProtocolError`` for what is no such list."""
        try:
            with closing(Folders(self._root)) as folders:
                for entry in json.loads(entries):
                    contents = contents[self._make(folders, entry, contents) :]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ProtocolError(f"the contents of a tmpfs cannot be read: {error!r}") from error

    def finish(self) -> None:
        """All lists were put: folders get their times, which change as long as something is made in them."""
        with closing(Folders(self._root)) as folders:
            for entry in reversed(self._made):
                _dress(folders.file(entry["path"]), entry, follow=not entry["path"])
        self._made.clear()

    def _make(self, folders: Folders, entry: dict[str, Any], contents: memoryview) -> int:
        """Make one file; how many bytes of the contents were its own."""
        kind, path = entry["kind"], _checked(entry["path"])
        length = entry["size"] if kind == "file" else 0
        if kind == "folder":
            self._made.append(entry)
            if path:
                os.mkdir(path[-1], 0o700, dir_fd=folders.of(path))
            return 0
        if kind == "link":
            first = os.open(folders.file(_checked(entry["to"])), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            self._name(first, folders, path)
            os.close(first)
            return 0
        if kind == "symlink":
            os.symlink(entry["to"], path[-1], dir_fd=folders.of(path))
        elif kind == "node":
            os.mknod(path[-1], entry["type"] | 0o600, entry["device"], dir_fd=folders.of(path))
        elif kind == "pages":
            descriptor = self._pages(entry["number"])
            os.ftruncate(descriptor, entry["size"])
            self._name(descriptor, folders, path)
        else:
            _write(folders.of(path), path[-1], contents[:length])
        _dress(folders.file(path), entry)
        return int(length)

    @staticmethod
    def _name(descriptor: int, folders: Folders, path: Sequence[str]) -> None:
        """Give a file a name (open(2), O_TMPFILE)."""
        os.link(f"/proc/self/fd/{descriptor}", path[-1], dst_dir_fd=folders.of(path), follow_symlinks=True)


def _write(folder: int, name: str, content: memoryview) -> None:
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        at = 0
        while at < len(content):
            at += os.pwrite(descriptor, content[at:], at)
    finally:
        os.close(descriptor)


def _dress(path: str, entry: dict[str, Any], *, follow: bool = False) -> None:
    """Owner, mode, attributes and times, in the order in which none undoes another."""
    os.chown(path, *entry["owner"], follow_symlinks=follow)
    if entry["kind"] != "symlink":
        os.chmod(path, entry["mode"])  # noqa: PTH101
    for name, value in entry["attributes"].items():
        os.setxattr(path, name, base64.b64decode(value), follow_symlinks=follow)
    os.utime(path, ns=tuple(entry["times"]), follow_symlinks=follow)


def _checked(path: list[str]) -> list[str]:
    """A path below the root. What is none is refused: the other side must not write elsewhere."""
    for name in path:
        if "/" in name or name in ("", ".", ".."):
            raise ProtocolError(f"a file named {name!r} was sent")
    return path
