"""The source's side of a workload's tmpfs mounts (/dev/shm and others) that we bring over instead of CRIU.

Large files go in the rounds and the rest of them in the freeze, page for page, into files of a tmpfs that the
destination's agent has made; everything else as a list, in the freeze (``tmpfs_entries``). CRIU is told at the dump
that the mount is external, and at the restore where the destination's is (docs/decisions/0021-tmpfs.md).

A mount with many small files and no large one is left to CRIU, whose tar is as fast. One that is nearly empty is not:
to start tar takes some 4 ms of the freeze on each host.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

from coordinator.agent.channel import Channel
from coordinator.agent.memory.base import NO_FILES, PAGE_BYTES, HeldFiles, ProcessChanges
from coordinator.agent.memory.page_messages import consecutive, dropped
from coordinator.agent.memory.pages import BATCH_BYTES
from coordinator.agent.memory.ptrace import TargetGone
from coordinator.agent.memory.tmpfs_entries import LARGE_BYTES, Folders, Found, listed, open_file, walk
from coordinator.agent.memory.tmpfs_files import File, Files, Key, device_name
from coordinator.agent.memory.tmpfs_mounts import TmpfsPoint, movable
from coordinator.agent.messages import (
    TmpfsEntries,
    TmpfsFile,
    TmpfsFileGone,
    TmpfsMount,
)
from coordinator.agent.tasks import process_tree
from coordinator.errors import TrackingFailed

#: With more files than that CRIU's tar is as fast, few of them without a large one; and each large one takes a
#: descriptor of ours, and a watch.
_MOST_FILES, _FEW_FILES, _MOST_LARGE = 5000, 50, 200

PROC = Path("/proc")


class TmpfsSource(Protocol):
    """The tmpfs mounts of one workload that are brought over. All but ``send`` and ``complete`` blocks."""

    def begin(self, *, last: bool = False, fixed: bool = False) -> None:
        """Begin a look, before the processes are asked. ``last``: they are frozen; ``fixed``: CRIU has been told which
        mounts are ``external``, and no other is taken on.

        Raises ``TrackingFailed`` if a mount cannot be brought over any more."""

    @property
    def known(self) -> HeldFiles:
        """The files of which the processes are to tell what their page tables tell."""

    def take(self, answers: Iterable[ProcessChanges], *, last: bool = False) -> None:
        """End a look, with the processes' answers."""

    @property
    def dirty_bytes(self) -> int:
        """What there is to send, by the last look."""

    async def send(self, link: Channel, *, at_once: int = BATCH_BYTES) -> int:
        """Send what the last look has found of the large files, so many bytes at once; returns the bytes."""

    async def complete(self, link: Channel) -> int:
        """When what the last look has found is sent, and CRIU's dump is complete: send everything else; returns the
        bytes."""

    @property
    def external(self) -> tuple[str, ...]:
        """What CRIU is told at the dump (criu(8), --external)."""

    def stop(self) -> None:
        """The move is over: a look that is under way ends soon."""

    def close(self) -> None:
        """Let go of the mounts. Idempotent."""


class NoTmpfs:
    """The ``TmpfsSource`` of a workload whose mounts are all left to CRIU."""

    known = NO_FILES
    dirty_bytes = 0
    external: tuple[str, ...] = ()

    def begin(self, *, last: bool = False, fixed: bool = False) -> None:
        """See ``TmpfsSource``."""

    def take(self, answers: Iterable[ProcessChanges], *, last: bool = False) -> None:
        """See ``TmpfsSource``."""

    async def send(self, link: Channel, *, at_once: int = BATCH_BYTES) -> int:
        """See ``TmpfsSource``."""
        return 0

    async def complete(self, link: Channel) -> int:
        """See ``TmpfsSource``."""
        return 0

    def stop(self) -> None:
        """See ``TmpfsSource``."""

    def close(self) -> None:
        """See ``TmpfsSource``."""


@dataclass(slots=True)
class _Mount:
    number: int
    at: TmpfsPoint
    root: int
    told: bool = False


class OwnTmpfs:
    """The real ``TmpfsSource``: mounts that are the workload's alone (``tmpfs_mounts``)."""

    def __init__(self, root_pid: int) -> None:
        """Raises ``OSError`` (see ``Files``)."""
        self._root_pid = root_pid
        self._mounts: list[_Mount] = []
        self._files = Files()
        self._told: dict[int, int] = {}  # by a file's number, that of its mount
        self._gone: list[int] = []
        self._pids: tuple[int, ...] = ()

    def begin(self, *, last: bool = False, fixed: bool = False) -> None:
        """See ``TmpfsSource``."""
        self._pids = tuple(process_tree(self._root_pid))
        points = self._points()
        if not (fixed or last):
            self._choose(points)
        elif lost := {mount.at.point for mount in self._mounts} - {each.point for each in points}:
            raise _no_more(min(lost), "what is mounted there has changed")
        opens: dict[Key, Callable[[], int]] = {}
        for mount in self._mounts:
            try:
                found = list(walk(mount.root))
            except OSError as error:
                raise _no_more(mount.at.point, str(error)) from error
            for each in found:
                if each.large:
                    opens[mount.at.device, each.status.st_ino] = partial(_open, mount.root, each)
        self._gone += self._files.begin(opens, self._pids, compare=fixed or last)

    def _points(self) -> tuple[TmpfsPoint, ...]:
        """What could be brought over; nothing where the workload has mounts that the root does not see, or ids of its
        own, which a mount of ours would not know."""
        root = PROC / str(self._root_pid)
        try:
            if (PROC / "self/ns/user").readlink() != (root / "ns/user").readlink():
                return ()
            space = (root / "ns/mnt").readlink()
            for pid in self._pids:
                with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                    if (PROC / str(pid) / "ns/mnt").readlink() != space:
                        return ()
            return movable((root / "mountinfo").read_text(), (PROC / "self/mountinfo").read_text())
        except OSError as error:
            raise TargetGone(f"process {self._root_pid}, the root of the workload, is gone") from error

    def _choose(self, points: tuple[TmpfsPoint, ...]) -> None:
        """Take on what is worth it."""
        known = {mount.at.point for mount in self._mounts}
        for point in points:
            if point.point in known:
                continue
            path = f"{PROC}/{self._root_pid}/root{point.point}"
            root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if device_name(os.fstat(root).st_dev) == point.device and _is_worth_it(root):
                self._mounts.append(_Mount(len(self._mounts), point, root))
            else:
                os.close(root)

    @property
    def known(self) -> HeldFiles:
        """See ``TmpfsSource``."""
        return {key: file.data for key, file in self._files.files.items()}

    def take(self, answers: Iterable[ProcessChanges], *, last: bool = False) -> None:
        """See ``TmpfsSource``."""
        self._files.take(answers, self._pids, last=last)

    @property
    def dirty_bytes(self) -> int:
        """See ``TmpfsSource``."""
        return self._files.dirty_pages * PAGE_BYTES

    @property
    def external(self) -> tuple[str, ...]:
        """See ``TmpfsSource``."""
        return tuple(f"mnt[{mount.at.point}]:{cookie(mount.number)}" for mount in self._mounts)

    async def send(self, link: Channel, *, at_once: int = BATCH_BYTES) -> int:
        """See ``TmpfsSource``."""
        for mount in self._mounts:
            if not mount.told:
                mount.told = True
                at = mount.at
                await link.send(TmpfsMount(mount=mount.number, point=at.point, source=at.source, options=at.options))
        for number in self._gone:  # first: what they hold makes room for others
            if self._told.pop(number, None) is not None:
                await link.send(TmpfsFileGone(number=number))
        self._gone.clear()
        devices = {mount.at.device: mount.number for mount in self._mounts}
        return sum([await self._send(link, file, devices[file.key[0]], at_once) for file in self._files.files.values()])

    async def _send(self, link: Channel, file: File, mount: int, step: int) -> int:
        if file.number not in self._told:
            self._told[file.number] = mount
            await link.send(TmpfsFile(number=file.number, mount=mount))
        for message in dropped(file.number, file.too_much):
            await link.send(message)
        sent, content = 0, file.read(file.wanted, step)
        while (piece := await asyncio.to_thread(next, content, None)) is not None:
            at, data = piece
            await link.send(consecutive(file.number, at, data), data)
            sent += len(data)
        file.sent()
        return sent

    async def complete(self, link: Channel) -> int:
        """See ``TmpfsSource``."""
        sent = 0
        for mount in self._mounts:
            here = (each for each in self._files.files.values() if each.key[0] == mount.at.device)
            numbers = {each.key[1]: each.number for each in here}
            try:
                lists = list(listed(mount.root, walk(mount.root), numbers))
            except (OSError, KeyError) as error:
                raise _no_more(mount.at.point, repr(error)) from error
            for at, (entries, contents) in enumerate(lists, 1):
                sizes = (len(entries), len(contents))
                message = TmpfsEntries(mount=mount.number, sizes=sizes, complete=at == len(lists))
                await link.send(message, entries + contents)
                sent += sum(sizes)
        return sent

    def stop(self) -> None:
        """See ``TmpfsSource``."""
        self._files.stop()

    def close(self) -> None:
        """See ``TmpfsSource``."""
        self._files.close()
        for mount in self._mounts:
            os.close(mount.root)
        self._mounts.clear()


def cookie(mount: int) -> str:
    """What a mount is called in CRIU's images."""
    return f"livemove-{mount}"


def _open(root: int, found: Found) -> int:
    with closing(Folders(root)) as folders:
        return open_file(folders, found)


def _is_worth_it(root: int) -> bool:
    """Whether it takes CRIU's tar longer than us: to copy what is large, or to be started where there is next to
    nothing."""
    try:
        found = list(islice(walk(root), _MOST_FILES + 1))
    except OSError:
        return False
    large = [each.status.st_blocks * 512 for each in found if each.large]
    if sum(large) >= LARGE_BYTES:
        return len(large) <= _MOST_LARGE and len(found) <= _MOST_FILES
    return len(found) <= _FEW_FILES and sum(each.status.st_size for each in found if not each.large) < LARGE_BYTES


def _no_more(point: str, why: str) -> TrackingFailed:
    return TrackingFailed(
        f"the tmpfs at {point} of the service cannot be copied any more: {why}",
        "Move again; `--mode stop-copy` leaves it to CRIU.",
    )
