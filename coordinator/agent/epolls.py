"""Whether each entry of the frozen tasks' epolls is what its number says, so that CRIU need not ask of every one.

An entry of an epoll is an open file, added under its number. Closed where that number was, it stays as long as a copy
of it lives, and the number may have become another file's (epoll(7), questions and answers). So CRIU asks the kernel of
each entry whether it is the file that has the number now (kcmp(2), KCMP_EPOLL_TFD; criu/eventpoll.c), and the kernel
looks through the whole epoll for it: with 5000 entries that takes 0.2 s of the freeze, with twice as many four times
that.

proc(5) tells the inodes of all entries at once. The inode of a socket has one open file (net/socket.c,
sock_alloc_file; it cannot be opened by a path), so the same inode is the same file. Of all else (eventfd, timerfd,
pipe) we ask as CRIU does: there are few of them. If every entry is what its number says, CRIU is told so of each
(``criu_filter``); if one is not, CRIU finds out by itself, as ever.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from coordinator.agent.other_processes import descriptors, kcmp
from coordinator.agent.tasks import process_tree

#: A number, inode and device of an entry (fs/eventpoll.c, ep_show_fdinfo).
_ENTRY = re.compile(rb"^tfd:\s*(\d+) .* ino:([0-9a-f]+) sdev:([0-9a-f]+)$", re.MULTILINE)
#: What readlink(2) says of descriptors (proc(5)).
_SOCKET, _EPOLL = "socket:[", "anon_inode:[eventpoll]"

KCMP_EPOLL_TFD = 7
_SLOT = struct.Struct("=III")  # struct kcmp_epoll_slot
#: Of so many entries of an epoll that are no sockets the kernel is asked; of more of them CRIU may ask itself.
MOST_ASKED = 64

#: What things take in the freeze, in microseconds (measured: docs/performance.md): the kernel to pass an entry while it
#: looks for another; us to look at an entry; to put CRIU under the filter.
_STEP_US, _LOOK_US, _FILTER_US = 0.0075, 8, 6000


#: An entry of an epoll: the number under which a file was added, and that file's inode and device.
Entry = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Opened:
    """What a process has open: the inodes of its sockets, and the entries of its epolls, by number."""

    sockets: Mapping[int, int] = field(default_factory=dict)
    epolls: Mapping[int, Collection[Entry]] = field(default_factory=dict)


class Epolls:
    """The epolls of a tree of processes."""

    def __init__(self, root_pid: int) -> None:
        self._root_pid = root_pid
        self._looking = threading.Lock()
        self._answer: bool | None = None

    def pays(self) -> bool:
        """Whether CRIU would take longer to ask than we to look. Takes some milliseconds for thousands of files."""
        return pays(len(entries) for pid in process_tree(self._root_pid) for entries in opened(pid).epolls.values())

    def look(self) -> None:
        """Find out, at the first call, whether every entry is what its number says: the tasks are frozen, and stay so.

        Who calls meanwhile waits. Raises ``OSError``."""
        with self._looking:
            if self._answer is None:
                self._answer = all(_as_numbered(pid) for pid in process_tree(self._root_pid))

    def as_numbered(self) -> bool:
        """What ``look`` has found, or finds now."""
        self.look()
        return bool(self._answer)


def pays(entries: Iterable[int]) -> bool:
    """Whether it is worth while, given how many entries each epoll has (pure). About 1600 in one are enough."""
    saved = spent = 0.0
    for count in entries:
        saved += count * count * _STEP_US
        spent += count * _LOOK_US
    return saved > _FILTER_US + spent


def as_numbered(entries: Collection[Entry], sockets: Mapping[int, int], asked: Callable[[int], bool]) -> bool:
    """Whether every entry of an epoll is what its number says. ``asked`` tells it of a number, at a price.

    Two entries of one number: at least one of them is not."""
    if len({number for number, _, _ in entries}) < len(entries):
        return False
    socket_device = _socket_device()
    others = [number for number, inode, device in entries if inode != sockets.get(number) or device != socket_device]
    return len(others) <= MOST_ASKED and all(map(asked, others))


def opened(pid: int) -> Opened:
    """What a process has open; nothing, if it is gone. Some 7 µs for each file, nearly all of it the kernel's."""
    links = dict(descriptors(pid))
    sockets = {int(number): int(link[len(_SOCKET) : -1]) for number, link in links.items() if link.startswith(_SOCKET)}
    epolls = {}
    for number in (number for number, link in links.items() if link == _EPOLL):
        with suppress(FileNotFoundError):  # closed meanwhile
            epolls[int(number)] = _entries(f"/proc/{pid}/fdinfo/{number}")
    return Opened(sockets, epolls)


def is_entry(pid: int, epoll: int, number: int) -> bool:
    """Whether an epoll's entry of a number is the file that has the number now; ``False`` where that cannot be told."""
    slot = ctypes.create_string_buffer(_SLOT.pack(epoll, number, 0), _SLOT.size)
    return kcmp(pid, pid, KCMP_EPOLL_TFD, number, ctypes.addressof(slot)) == 0


def _as_numbered(pid: int) -> bool:
    there = opened(pid)
    return all(
        as_numbered(entries, there.sockets, partial(is_entry, pid, epoll)) for epoll, entries in there.epolls.items()
    )


def _entries(path: str) -> list[Entry]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(descriptor, 1 << 20):
            parts.append(part)
    finally:
        os.close(descriptor)
    found = _ENTRY.findall(b"".join(parts))
    return [(int(number), int(inode, 16), int(device, 16)) for number, inode, device in found]


def _socket_device() -> int:
    """The device of all sockets' inodes, as the kernel writes it by itself (include/linux/kdev_t.h, MKDEV)."""
    with socket.socket() as any_socket:
        number = os.fstat(any_socket.fileno()).st_dev
    return os.major(number) << 20 | os.minor(number)
