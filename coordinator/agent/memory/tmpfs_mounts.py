"""Which tmpfs mounts of a workload can be brought over by us instead of by CRIU (pure).

CRIU packs a tmpfs with tar in the freeze, all of it. A mount that it is told is external it leaves alone, and restores
as a bind of whatever it is given there (criu/mount.c, try_resolve_ext_mount, do_bind_mount): a tmpfs of ours. That is
done only with what we can make the same on another host. All else stays with CRIU, which is right and slow.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

#: What we can say to mount(2) again as mountinfo tells it (mm/shmem.c, shmem_show_options). ``mpol`` names nodes of
#: memory that the other host may not have.
_OPTIONS = re.compile(r"rw|inode(32|64)|noswap|(size|nr_inodes|mode|uid|gid|huge)=[\w%]+")
#: Paths that need no quoting, neither in mountinfo nor for CRIU's parser.
_PLAIN = re.compile(r"(/[\w.@+-]+)+", re.ASCII)
_SIZE = re.compile(r"\bsize=(\d+)k\b")
_INODES = re.compile(r"\bnr_inodes=(\d+)\b")


@dataclass(frozen=True, slots=True)
class TmpfsPoint:
    """A mounted tmpfs: its device as in maps (proc(5)), where it is in the workload, what it is called as a source, and
    the options of the file system."""

    device: str
    point: str
    source: str
    options: str


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of mountinfo (proc(5))."""

    number: str
    parent: str
    device: str
    root: str
    point: str
    shared: bool
    kind: str
    source: str
    options: str


def movable(mountinfo: str, ours: str) -> tuple[TmpfsPoint, ...]:
    """The mounts in a workload's mountinfo that are its own alone, and hide nothing: the whole of a tmpfs which is
    mounted nowhere else, neither there nor in ``ours``, with nothing mounted below or above it."""
    lines, host = _parse(mountinfo), {line.device for line in _parse(ours)}
    devices, points = Counter(line.device for line in lines), Counter(line.point for line in lines)
    parents = {line.parent for line in lines}
    return tuple(
        TmpfsPoint(line.device, line.point, line.source, line.options)
        for line in lines
        if line.kind == "tmpfs"
        and line.root == "/"
        and not line.shared
        and devices[line.device] == points[line.point] == 1
        and line.device not in host
        and line.number not in parents
        and _PLAIN.fullmatch(line.point)
        and "\\" not in line.source
        and all(_OPTIONS.fullmatch(option) for option in line.options.split(","))
    )


def mounted(mountinfo: str) -> dict[str, str]:
    """The devices of all mounts, as in maps, by where they are; of several above each other that of the last."""
    return {line.point: line.device for line in _parse(mountinfo)}


def _parse(mountinfo: str) -> list[_Line]:
    lines = []
    for text in mountinfo.splitlines():
        before, _, after = text.partition(" - ")
        number, parent, device, root, point, _, *optional = before.split()
        major, _, minor = device.partition(":")
        kind, source, options = after.split(" ")
        name = f"{int(major):02x}:{int(minor):02x}"
        lines.append(_Line(number, parent, name, root, point, bool(optional), kind, source, options))
    return lines


def limits(options: str, factor: int = 1) -> str:
    """The limits among the options of a tmpfs, or a multiple of them."""
    found = []
    if size := _SIZE.search(options):
        found.append(f"size={int(size[1]) * factor}k")
    if inodes := _INODES.search(options):
        found.append(f"nr_inodes={int(inodes[1]) * factor}")
    return ",".join(found)


def roomier(options: str) -> str:
    """The options of a tmpfs with room for what is there only for a while, as it is being filled."""
    kept = [
        option for option in options.split(",") if option != "rw" and not option.startswith(("size=", "nr_inodes="))
    ]
    return ",".join([*kept, *filter(None, [limits(options, 2)])])
