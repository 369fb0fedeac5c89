"""A tree that is copied with the real rsync between two directories of this machine, and what is in it."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from coordinator.agent.fakes.channel import fake_channel
from coordinator.agent.files.left_over import LeftOver
from coordinator.agent.files.looking import listing, walk
from coordinator.agent.files.source import SyncedFiles
from coordinator.agent.files.target import ReceivedFiles
from coordinator.agent.messages import SyncBegin
from coordinator.facts import Tree
from labs import root

_WRAPPER = """#!/bin/sh
exec {loader} --library-path {libraries} {root}/usr/bin/rsync "$@"
"""


@contextmanager
def rsync_to_be_found(folder: Path) -> Iterator[None]:
    """The lab's rsync, where this machine has none."""
    if shutil.which("rsync") is None:
        lab = root.ensure("base")
        (loader,) = lab.glob("usr/lib*/ld-linux-*.so.*")
        libraries = next(lab.glob("usr/lib/*-linux-gnu"))
        (folder / "rsync").write_text(_WRAPPER.format(loader=loader, libraries=libraries, root=lab))
        (folder / "rsync").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        yield


@dataclass
class Two:
    """A tree on the "source", what becomes of it on the "destination", and the adapters between them."""

    folder: Path
    passes: list[tuple[str, ...]] = field(default_factory=list)
    told: list[tuple[str, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.here, self.there = self.folder / "here/tree", self.folder / "there/tree"
        self.here.mkdir(parents=True)
        for name in ("work-here", "work-there"):
            (self.folder / name).mkdir()
        self.source = SyncedFiles([self._tree(self.here)], LeftOver(self.folder, "w"), self.folder / "work-here")
        left_over = LeftOver(self.folder / "state", "w")
        self.target = ReceivedFiles([self._tree(self.there)], left_over, self.folder / "work-there")
        self.channel, self.other = fake_channel()
        self._serving: asyncio.Task[None] | None = None

    @staticmethod
    def _tree(path: Path) -> Tree:
        return Tree(path=str(path), inside=str(path), files="sync")

    def begin(self) -> None:
        self.target.make()
        self._serving = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        while True:
            message, _ = await self.other.receive()
            assert isinstance(message, SyncBegin), message
            self.passes.append(message.arguments)
            await self.target.receive(self.other, message)

    async def copied(self) -> None:
        self.begin()
        await self.source.copy(self.channel, lambda *told: self.told.append(told))

    async def last(self) -> None:
        await self.source.catch_up(os.getpid(), self.channel)
        await self.source.last(os.getpid(), self.channel)

    async def close(self) -> list[str]:
        warnings = self.source.close()
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait((self._serving,))
        return warnings

    def check_equal(self) -> None:
        assert listing(str(self.here)) == listing(str(self.there))
        assert times(self.here) == times(self.there)
        assert links(self.here) == links(self.there)


def times(root: Path) -> dict[str, int]:
    return {path: about.st_mtime_ns for path, about in walk(str(root))}


def links(root: Path) -> set[frozenset[str]]:
    names: dict[int, set[str]] = {}
    for path, about in walk(str(root)):
        names.setdefault(about.st_ino, set()).add(path)
    return {frozenset(each) for each in names.values()}


def replace(root: Path) -> None:
    """As an editor does: a new file of the name of an old one."""
    (root / "plain.new").write_text("new")
    (root / "plain.new").rename(root / "plain")
