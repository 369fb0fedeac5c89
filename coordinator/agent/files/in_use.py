"""The files of the trees that a workload's tasks could write to: mapped shared and writable, or open for writing.

A write through a mapping makes no event and, after the first one to a page, no new time of change. So what is mapped is
compared byte by byte in the freeze. Of what is open for writing, the times tell.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.agent.files.trees import outside_path
from coordinator.agent.tasks import PROC
from coordinator.facts import Tree

#: A file of a tree: the tree's number, and the path in it.
Place = tuple[int, str]


@dataclass(frozen=True, slots=True)
class Stamp:
    """What changes when a file is written to by a call (inode(7)); nobody can set the last one back."""

    size: int
    modified_ns: int
    changed_ns: int


@dataclass(frozen=True, slots=True)
class InUse:
    """``mapped``: these may have changed without a trace. ``open``: these have not, if the stamp is an old one."""

    mapped: frozenset[Place]
    open: dict[Place, Stamp]


def files_in_use(pids: Iterable[int], trees: Sequence[Tree], proc: Path = PROC) -> InUse:
    """What the tasks have of the trees, at this moment."""
    mapped, opened = set(), {}
    for pid in pids:
        for inside, about in _mapped(proc / str(pid)):
            if (place := _place(inside, about, trees)) is not None:
                mapped.add(place)
        for inside, about in _open(proc / str(pid)):
            if (place := _place(inside, about, trees)) is not None:
                opened[place] = Stamp(about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    return InUse(frozenset(mapped), opened)


def _place(inside: str, about: os.stat_result, trees: Sequence[Tree]) -> Place | None:
    """Where a file of a task is on the host. One without a name any more is CRIU's business; a path that names another
    file here is of another mount of the workload's."""
    found = outside_path(inside, trees)
    if found is None or not stat.S_ISREG(about.st_mode) or about.st_nlink == 0:
        return None
    tree, path = found
    try:
        return (trees.index(tree), path) if os.path.samestat(os.lstat(f"{tree.path}/{path}"), about) else None
    except OSError:
        return None


def _mapped(process: Path) -> Iterator[tuple[str, os.stat_result]]:
    """proc(5): maps, and the file behind each in map_files."""
    for line in _lines(process / "maps"):
        addresses, permissions, _, _, inode, *path = line.split(maxsplit=5)
        if permissions[1] == "w" and permissions[3] == "s" and inode != "0" and path:
            start, _, end = addresses.partition("-")
            link = process / "map_files" / f"{int(start, 16):x}-{int(end, 16):x}"
            yield from _followed(link)


def _open(process: Path) -> Iterator[tuple[str, os.stat_result]]:
    """proc(5): descriptors whose flags say that they can be written to."""
    try:
        descriptors = list((process / "fd").iterdir())
    except OSError:
        return  # it has ended
    for link in descriptors:
        flags = next((line for line in _lines(process / "fdinfo" / link.name) if line.startswith("flags:")), "flags: 0")
        if int(flags.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY:
            yield from _followed(link)


def _followed(link: Path) -> Iterator[tuple[str, os.stat_result]]:
    try:
        path, about = os.readlink(link), link.stat()  # noqa: PTH115 - a name that need not be text
    except OSError:
        return
    if path.startswith("/"):
        yield path, about


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
