"""From what has happened in a tree to what has to be sent of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from coordinator.agent.files.looking import walk
from coordinator.agent.files.watch import Changed


class Links:
    """The names of files that have several: to send one of them without the others would part them."""

    def __init__(self) -> None:
        self._names: dict[int, set[str]] = {}

    def learn(self, root: str) -> None:
        """Look at a whole tree."""
        for path, about in walk(root):
            self.add(path, about)

    def add(self, path: str, about: os.stat_result) -> None:
        """A file was seen at that path of the tree."""
        if about.st_nlink > 1 and not stat.S_ISDIR(about.st_mode):
            self._names.setdefault(about.st_ino, set()).add(path)

    def of(self, about: os.stat_result) -> set[str]:
        """All names that were seen of that file."""
        return self._names.get(about.st_ino, set())


@dataclass(frozen=True, slots=True)
class ToSend:
    """Paths in a tree. ``replaced``: some are directories of which nothing else may be left on the other side."""

    paths: list[str]
    replaced: bool = False


def to_send(root: str, changes: Iterable[Changed], links: Links) -> ToSend:
    """What rsync has to look at: what has changed, all that is in a directory that has come, every name of a file that
    has several; and what is gone, by the uppermost directory that is."""
    gone: set[str] = set()
    there: dict[str, os.stat_result] = {}
    others: set[str] = set()
    for each in changes:
        about = _stat(root, each.path)
        if about is None:
            gone.add(_uppermost_gone(root, each.path))
            continue
        there[each.path] = about
        if stat.S_ISDIR(about.st_mode) and each.other:
            others.add(each.path)
        if stat.S_ISDIR(about.st_mode) and each.whole:
            there |= {_below(each.path, path): below for path, below in walk(f"{root}/{each.path}")}
    for path, about in there.items():
        links.add(path, about)
    names = {
        name
        for about in there.values()
        if about.st_nlink > 1
        for name in links.of(about)
        if (found := _stat(root, name)) is not None and os.path.samestat(found, about)
    }
    return ToSend(sorted(gone | there.keys() | names), bool(others))


def changed_since(root: str, moment_ns: int) -> str:
    """The first entry of a tree whose content or attributes were changed after that moment (``time.time_ns``), which
    reading everything has to find out where there are no events; empty if there is none."""
    return next((path for path, about in walk(root) if about.st_ctime_ns > moment_ns), "")


def _stat(root: str, path: str) -> os.stat_result | None:
    with suppress(FileNotFoundError, NotADirectoryError):
        return os.lstat(f"{root}/{path}")
    return None


def _below(folder: str, path: str) -> str:
    return folder if path == "." else path if folder == "." else f"{folder}/{path}"


def _uppermost_gone(root: str, path: str) -> str:
    while (parent := os.path.dirname(path)) and _stat(root, parent) is None:  # noqa: PTH120 - names that are no text
        path = parent
    return path
