"""Memfds in the rounds: whether everybody who can write to one does so through a mapping, and is asked.

One that has a descriptor is *compared* with what was sent of it, from then on for good: page tables tell of what is
written through mappings, and what they do not tell is found when all are frozen (``sent_digests``).

A write(2) through a descriptor is in no page table. But a memfd may have lost its descriptors, and then is like
anonymous shared memory, which is what most of these have been: CRIU restores that as a memfd without a descriptor.

A memfd is *closed* in a look if at its beginning no process of the tree had a descriptor of it, none was on its way in
a message between them (unix(7), SCM_RIGHTS), and nobody outside has, or maps, it. From there on a descriptor can only
come from one that there is (dup, fork, SCM_RIGHTS), and there is none; or be opened by way of /proc/PID/map_files,
which takes CAP_CHECKPOINT_RESTORE and is not covered. So until a look finds one, its page tables tell everything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from coordinator.agent.memory import holders
from coordinator.agent.memory.base import ProcessChanges

_MEMFD = "/memfd:"

#: Of these processes the inodes of the memfds that have a descriptor; ``None`` where one may be on its way.
Holders = Callable[[Iterable[int]], frozenset[int] | None]
#: Which of these inodes somebody has who is none of the processes.
Outside = Callable[[Iterable[int], Iterable[int]], frozenset[int]]


class Memfds:
    """The memfds of one tree of processes. A look begins with ``untouched`` and ends with ``take``; used by one thread
    at a time."""

    def __init__(self, held: Holders | None = None, outside: Outside | None = None, *, compare: bool = True) -> None:
        """``compare``: whether those with a descriptor are compared."""
        self._compare = compare
        self._holders = held or held_by
        self._outside = outside or held_outside
        self._mapped: frozenset[int] | None = None
        self._held: frozenset[int] | None = None
        self._seen_outside: dict[int, bool] = {}
        self._pids: tuple[int, ...] = ()
        #: The inodes of those that were closed in the look before, and of those that are compared.
        self.closed: frozenset[int] = frozenset()
        self.compared: frozenset[int] = frozenset()

    def untouched(self, pids: Iterable[int]) -> frozenset[int]:
        """Begin a look at these processes: the memfds whose every change since the look before they will tell.

        Takes some 3 µs for each of their descriptors; from the second look on only if they map memfds at all."""
        self._pids = tuple(pids)
        is_first = self._mapped is None
        self._held = self._holders(self._pids) if is_first or self._mapped else None
        return frozenset() if self._held is None else self.closed - self._held

    def take(self, answers: Iterable[ProcessChanges]) -> None:
        """End a look, with what all processes have answered after it began."""
        mappings = (mapping for each in answers for mapping in each.changes.mappings)
        self._mapped = frozenset(mapping.memfd for mapping in mappings if mapping.memfd is not None)
        free = frozenset() if self._held is None else self._mapped - self._held
        if new := free - self._seen_outside.keys():
            # One that was made after the look began may have a descriptor that was not seen.
            held = self._holders(self._pids)
            free = free - (new if held is None else held & new)
            new &= free
            found = self._outside(new, self._pids)
            self._seen_outside.update((inode, inode in found) for inode in new)
        self.closed = frozenset(inode for inode in free if not self._seen_outside[inode])
        if self._compare:
            self.compared |= self._mapped - self.closed


def held_by(pids: Iterable[int]) -> frozenset[int] | None:
    """See ``Holders``."""
    return holders.held_by(pids, _memfd)


def held_outside(inodes: Iterable[int], pids: Iterable[int]) -> frozenset[int]:
    """See ``Outside``."""
    return holders.held_outside(pids, _memfd, lambda mapping: mapping.memfd) & frozenset(inodes)


def _memfd(pid: int, number: str, link: str) -> int | None:
    return os.stat(f"/proc/{pid}/fd/{number}").st_ino if link.startswith(_MEMFD) else None  # noqa: PTH116 - thousands
