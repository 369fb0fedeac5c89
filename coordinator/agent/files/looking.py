"""What a tree is on this host: its size, what is in it, and whether another host has the very same one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from coordinator.agent.files.left_over import LeftOver
from coordinator.facts import Tree, TreeFacts

#: Sectors of struct stat (stat(2)).
_SECTOR_BYTES = 512
_CHUNK_BYTES = 1024 * 1024
_DIGEST_BYTES = 16
#: It is not there any more, or a directory above it is something else now.
_GONE = (FileNotFoundError, NotADirectoryError)


def walk(root: str) -> Iterator[tuple[str, os.stat_result]]:
    """Every entry of a tree, the root first as ".", parents before what is in them, in a fixed order.

    It stays on the root's file system. What goes away meanwhile is left out, be it the root; another ``OSError`` is
    raised."""
    try:
        top = os.lstat(root)
    except _GONE:
        return
    yield ".", top
    ahead = ["."]
    while ahead:
        folder = ahead.pop()
        try:
            with os.scandir(os.path.join(root, folder)) as entries:  # noqa: PTH118 - names that are no text
                names = sorted(entry.name for entry in entries)
        except _GONE:
            continue
        below = []
        for name in names:
            path = name if folder == "." else f"{folder}/{name}"
            with contextlib.suppress(*_GONE):
                about = os.lstat(f"{root}/{path}")
                if not stat.S_ISDIR(about.st_mode):
                    yield path, about
                elif about.st_dev == top.st_dev:  # of files an overlay file system tells the lower device
                    yield path, about
                    below.append(path)
        ahead += reversed(below)


def describe_tree(tree: Tree, left_over: LeftOver, nonce: str) -> TreeFacts:
    """A tree as it is here; ``nonce``: the name of the probe that the other host has put into what is shared."""
    path = Path(tree.path)
    if not os.path.lexists(path):
        room, entries = _free(next(each for each in path.parents if each.is_dir()))
        return TreeFacts(path=tree.path, state="absent", free_bytes=room, free_entries=entries)
    if path.is_symlink() or not path.is_dir():
        return TreeFacts(path=tree.path, state="filled", problem=f"{path} is not a directory")
    try:
        empty = not any(path.iterdir())
        found = TreeFacts(path=tree.path, state="empty" if empty else "filled", left_over=left_over.is_ours(path))
        if tree.files == "shared":
            return replace(found, probe_seen=bool(nonce) and (path / probe_name(nonce)).exists())
        if tree.files == "present":
            return replace(found, digest=digest(listing(tree.path)))
        used, entries = _size(tree.path)
        room, more = _free(path)
        return replace(found, used_bytes=used, entries=entries, free_bytes=room, free_entries=more)
    except OSError as error:
        return TreeFacts(path=tree.path, state="filled", problem=f"{path} cannot be read: {error}")


def _free(path: Path) -> tuple[int, int]:
    """Bytes and entries that root can add to a file system; one that does not count its entries takes any number."""
    about = os.statvfs(path)
    return about.f_bfree * about.f_frsize, about.f_ffree if about.f_files else 1 << 62


def _size(root: str) -> tuple[int, int]:
    """Bytes on disk and entries, hard links counted once."""
    used, entries, seen = 0, 0, set()
    for _, about in walk(root):
        if about.st_nlink > 1 and not stat.S_ISDIR(about.st_mode):
            if about.st_ino in seen:
                continue
            seen.add(about.st_ino)
        used += about.st_blocks * _SECTOR_BYTES
        entries += 1
    return used, entries


def listing(root: str) -> dict[str, str]:
    """A digest of each entry of a tree by itself: kind, mode, owners, content or target, and extended attributes, which
    include access control lists (acl(5)). Times are left out."""
    return {path: _digest_of(f"{root}/{path}", about) for path, about in walk(root)}


def digest(entries: dict[str, str]) -> str:
    """One digest of a listing."""
    whole = hashlib.sha256()
    for path, each in sorted(entries.items()):
        whole.update(os.fsencode(path) + b"\0" + each.encode())
    return whole.hexdigest()


def _digest_of(path: str, about: os.stat_result) -> str:
    mode = about.st_mode
    what = hashlib.sha256(repr((mode, about.st_uid, about.st_gid)).encode())
    if stat.S_ISLNK(mode):
        what.update(os.fsencode(os.readlink(path)))  # noqa: PTH115
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        what.update(repr(about.st_rdev).encode())
    elif stat.S_ISREG(mode):
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            while chunk := file.read(_CHUNK_BYTES):
                what.update(chunk)
    for name in sorted(_attributes(path)):
        what.update(name.encode() + b"\0" + os.getxattr(path, name, follow_symlinks=False))
    return what.hexdigest()[: 2 * _DIGEST_BYTES]


def _attributes(path: str) -> list[str]:
    """Those that belong to the file, rather than to the host's labels or to an overlay below."""
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError:
        return []  # a file system without them
    return [name for name in names if name != "security.selinux" and not name.startswith("trusted.overlay.")]


def probe_name(nonce: str) -> str:
    """The name of a probe."""
    return f".livemove-probe-{nonce}"


class Probes:
    """Files in what is said to be shared, for the other host to see. They are gone when they are withdrawn."""

    def __init__(self) -> None:
        self._made: list[Path] = []

    def offer(self, trees: tuple[Tree, ...], nonce: str) -> dict[str, str]:
        """Put a probe into each shared tree. Returns why that was not possible, by path."""
        problems = {}
        for tree in trees:
            if tree.files != "shared" or not Path(tree.path).is_dir():
                continue
            probe = Path(tree.path) / probe_name(nonce)
            try:
                self._made.append(probe)
                probe.touch()
            except OSError as error:
                problems[tree.path] = f"no probe can be written, to see whether it is shared: {error}"
        return problems

    def withdraw(self) -> None:
        """Remove all probes. Idempotent."""
        while self._made:
            with contextlib.suppress(OSError):
                self._made.pop().unlink()
