"""The source's end: passes of rsync while the service runs, and a last one, of what has changed, in the freeze."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from coordinator.agent.channel import Channel
from coordinator.agent.files.changes import Links, ToSend, changed_since, to_send
from coordinator.agent.files.in_use import Stamp, files_in_use
from coordinator.agent.files.left_over import LeftOver
from coordinator.agent.files.rsync import PARTIAL, SOCKET_BROKEN, STREAM_BROKEN, VANISHED, Rsync
from coordinator.agent.files.watch import Changed, Watch
from coordinator.agent.tasks import process_tree
from coordinator.errors import FilesChanged, FilesNotCopied
from coordinator.events import Progress
from coordinator.facts import Tree

#: Passes of what has changed: they stop when one was so short, or was not much shorter than the one before.
_SHORT_S, _SHRINKS, _MOST_PASSES = 0.2, 0.7, 10
#: With these statuses a pass has brought over all there is, all that was there while it ran, and most of it.
_COMPLETE, _CURRENT, _SOMETHING = frozenset({0}), frozenset({0, VANISHED}), frozenset({0, VANISHED, PARTIAL})
#: A service that runs can make a pass end so; it is made again. A file that goes after it was listed, and before its
#: access control list was read, makes rsync 3.5 send what the other side breaks off at.
_DISTURBED = frozenset({PARTIAL, SOCKET_BROKEN, STREAM_BROKEN})
_TRIES = 5

_libc = ctypes.CDLL(None, use_errno=True)


class SyncedFiles:
    """The real ``FilesSource``."""

    def __init__(self, trees: Iterable[Tree], left_over: LeftOver, work: Path) -> None:
        every = tuple(trees)
        self._shared = [tree for tree in every if tree.files == "shared"]
        #: The plan's number of each tree, which the destination knows it by.
        self._numbers = [number for number, tree in enumerate(every) if tree.files == "sync"]
        self._trees = [every[number] for number in self._numbers]
        self._left_over = left_over
        self._rsync = Rsync(work)
        self._links = [Links() for _ in self._trees]
        self._watch: Watch | None = None
        self._pending: set[Changed] = set()
        self._lost = False
        self._stamps: dict[tuple[int, str], Stamp] = {}
        self._warnings: list[str] = []
        self._progress: Progress = _tell_nobody
        self._sent_bytes = 0

    @property
    def wanted(self) -> bool:
        """See ``FilesSource``."""
        return bool(self._trees or self._shared)

    def claim(self) -> None:
        """See ``FilesSource``."""
        try:
            self._left_over.forget(Path(tree.path) for tree in self._trees)
        except OSError as error:
            raise FilesNotCopied(f"this host cannot note whose files {self._trees[0].path} has: {error}") from error

    def leave(self) -> None:
        """See ``FilesSource``."""
        if self._trees:
            self._left_over.remember(Path(tree.path) for tree in self._trees)

    async def copy(self, link: Channel, progress: Progress) -> None:
        """See ``FilesSource``. What changes during the second pass is known from events; that one looks at everything
        because the first may have taken hours."""
        if not self._trees:
            return
        self._progress = progress
        await self._until_little_changes(link)
        self._progress = _tell_nobody
        progress("files", self._sent_bytes, self._sent_bytes)

    async def _until_little_changes(self, link: Channel) -> None:
        await self._whole(link, only_once=True)
        self._begin_watch()
        for tree, links in zip(self._trees, self._links, strict=True):
            await asyncio.to_thread(links.learn, tree.path)
        await self._whole(link)
        before = float("inf")
        for _ in range(_MOST_PASSES):
            began = time.monotonic()
            await self._changes(link)
            took = time.monotonic() - began
            if took < _SHORT_S or took > before * _SHRINKS:
                return
            before = took

    async def catch_up(self, root_pid: int, link: Channel) -> None:
        """See ``FilesSource``."""
        if self._trees:
            self._stamps = files_in_use(process_tree(root_pid), self._trees).open
            await self._changes(link)

    async def last(self, root_pid: int, link: Channel) -> None:
        """See ``FilesSource``."""
        for tree in self._shared:
            await asyncio.to_thread(_flush, tree.path)
        if not self._trees:
            return
        frozen_at = time.time_ns()
        in_use = files_in_use(process_tree(root_pid), self._trees)
        written = {place for place, stamp in in_use.open.items() if self._stamps.get(place) != stamp}
        self._pending |= {Changed(tree, path) for tree, path in in_use.mapped | written}
        await self._changes(link, frozen=True)
        self.check_untouched()
        if self._watch is not None and not self._lost:
            return
        for tree in self._trees:
            if path := await asyncio.to_thread(changed_since, tree.path, frozen_at):
                raise _changed(tree, path)

    def check_untouched(self) -> None:
        """See ``FilesSource``."""
        if self._watch is None:
            return
        self._read_events()
        if self._pending:
            first = min(self._pending, key=lambda each: (each.tree, each.path))
            raise _changed(self._trees[first.tree], first.path)

    def close(self) -> list[str]:
        """See ``FilesSource``."""
        self._rsync.close()
        if self._watch is not None:
            asyncio.get_running_loop().remove_reader(self._watch)
            self._watch.close()
            self._watch = None
        warnings, self._warnings = self._warnings, []
        return warnings

    def _begin_watch(self) -> None:
        try:
            self._watch = Watch([tree.path for tree in self._trees])
        except OSError as error:
            self._warnings.append(f"the last pass looks at every file, because events are not to be had: {error}")
            return
        asyncio.get_running_loop().add_reader(self._watch, self._watch.read)

    def _read_events(self) -> None:
        """What has happened goes to what has to be sent."""
        assert self._watch is not None
        changed = self._watch.take()
        self._lost = self._lost or changed is None
        self._pending.update(changed or ())

    async def _changes(self, link: Channel, *, frozen: bool = False) -> None:
        """Send what has changed: by the events, or, where there are none or some were lost, by looking at everything.

        What is known by name is sent byte by byte in either case."""
        if self._watch is not None:
            self._read_events()
        if self._watch is None or self._lost:
            if self._lost and frozen:
                self._warnings.append("the last pass looked at every file: too many changed at once to keep up")
            self._lost = False
            await self._whole(link, frozen=frozen)
        pending, self._pending = self._pending, set()
        for number, tree in enumerate(self._trees):
            mine = [each for each in pending if each.tree == number]
            choose = functools.partial(to_send, tree.path, mine, self._links[number])
            await self._pass(link, number, choose, _COMPLETE if frozen else _CURRENT)

    async def _whole(self, link: Channel, *, frozen: bool = False, only_once: bool = False) -> None:
        """Look at everything. A pass that is made ``only_once`` need not be complete."""
        enough = _COMPLETE if frozen else _SOMETHING if only_once else _CURRENT
        for number in range(len(self._trees)):
            await self._pass(link, number, lambda: None, enough)

    async def _pass(
        self, link: Channel, number: int, choose: Callable[[], ToSend | None], enough: frozenset[int]
    ) -> None:
        """One pass, made again where the service may have disturbed it: all of the tree, or what is chosen."""
        path = self._trees[number].path
        for _ in range(1 if enough is _COMPLETE else _TRIES):
            what = await asyncio.to_thread(choose)
            if what is not None and not what.paths:
                return
            ended = await self._rsync.send(link, self._numbers[number], path, self._count, what)
            if ended.status in enough or ended.status not in _DISTURBED:
                break
        if ended.status not in enough:
            raise FilesNotCopied(f"copying {path}: rsync ended with {ended.status}: {ended.complaint}")

    def _count(self, sent_bytes: int) -> None:
        self._sent_bytes += sent_bytes
        self._progress("files", self._sent_bytes, 0)


def _tell_nobody(name: str, done: int, total: int) -> None:
    """In the freeze there is no time to tell."""


def _changed(tree: Tree, path: str) -> FilesChanged:
    named = os.fsencode(f"{tree.path}/{path}").decode(errors="replace")
    return FilesChanged(f"{named} was written to while the service was frozen, by somebody else")


def _flush(path: str) -> None:
    """Write out what the kernel has not written yet: the other host reads from the storage (syncfs(2))."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(descriptor) != 0:
            code = ctypes.get_errno()
            raise FilesNotCopied(f"{path} could not be written out: {os.strerror(code)}")
    finally:
        os.close(descriptor)
