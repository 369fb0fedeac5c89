"""The destination's end: directories for what comes, the other rsync, and the way back."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from coordinator.agent.channel import Channel
from coordinator.agent.files import rsync
from coordinator.agent.files.left_over import LeftOver
from coordinator.agent.messages import SyncBegin
from coordinator.errors import FilesNotCopied, ProtocolError
from coordinator.facts import Tree


class ReceivedFiles:
    """The real ``FilesTarget``."""

    def __init__(self, trees: Sequence[Tree], left_over: LeftOver, work: Path) -> None:
        self._trees = trees
        self._synced = [tree for tree in trees if tree.files == "sync"]
        self._left_over = left_over
        self._work = work

    def look(self) -> list[dict[str, Any]]:
        """See ``FilesTarget``: of each tree its path, and its ``state``. ``made``: the uppermost directory that has to
        be made for an absent one. ``owner`` and ``mode``: what an empty one has."""
        return [self._look(tree) for tree in self._synced]

    def _look(self, tree: Tree) -> dict[str, Any]:
        path = Path(tree.path)
        if not os.path.lexists(path):
            made = path
            while not made.parent.exists():
                made = made.parent
            return {"path": tree.path, "state": "absent", "made": str(made)}
        if path.is_symlink() or not path.is_dir():
            raise FilesNotCopied(f"{path} is not a directory", "Move it away.")
        if not any(path.iterdir()):
            about = path.stat()
            owner = [about.st_uid, about.st_gid]
            return {"path": tree.path, "state": "empty", "owner": owner, "mode": stat.S_IMODE(about.st_mode)}
        if not tree.root and not self._left_over.is_ours(path):
            message = f"{path} exists, and what is in it was not left there by a move of this workload"
            raise FilesNotCopied(message, "Look at what it is, and move it away or empty the directory.")
        return {"path": tree.path, "state": "kept"}

    def make(self) -> None:
        """See ``FilesTarget``."""
        for tree in self._synced:
            try:
                Path(tree.path).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise FilesNotCopied(f"{tree.path} cannot be made: {error}") from error

    async def receive(self, link: Channel, begin: SyncBegin) -> None:
        """See ``FilesTarget``."""
        if begin.tree not in range(len(self._trees)) or self._trees[begin.tree] not in self._synced:
            raise ProtocolError(f"the source sends a tree of number {begin.tree}, which is none that is to be copied")
        await rsync.receive(link, begin, self._trees[begin.tree].path, self._work / "rsync-complaints")

    async def remove(self, before: list[dict[str, Any]]) -> None:
        """See ``FilesTarget``."""
        await asyncio.to_thread(_remove, before)

    def claim(self) -> None:
        """See ``FilesTarget``."""
        self._left_over.forget(Path(tree.path) for tree in self._synced)


def _remove(before: list[dict[str, Any]]) -> None:
    for each in before:
        if each["state"] == "absent":
            with suppress(FileNotFoundError):
                shutil.rmtree(each["made"])
        elif each["state"] == "empty":
            path = Path(each["path"])
            for entry in path.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            os.chown(path, *each["owner"])
            path.chmod(each["mode"])
