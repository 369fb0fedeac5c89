"""What this host remembers: that a directory is what an earlier move of a workload has left behind.

A source keeps its files after a move. They are old from then on, and may be overwritten when the workload comes back.
What nobody remembers might be somebody else's, and is never touched. One file for each workload, below the journals.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path


class LeftOver:
    """The directories that a workload has left behind on this host."""

    def __init__(self, state: Path, workload: str) -> None:
        self._file = state / "left-over" / f"{workload}.json"

    def is_ours(self, path: Path) -> bool:
        """Whether it is the very directory that was remembered, not another of that name or one mounted over it."""
        return self._known().get(str(path)) == _identity(path)

    def remember(self, paths: Iterable[Path]) -> None:
        """The workload has gone: what is there is old. Durable."""
        self._write({**self._known(), **{str(path): _identity(path) for path in paths if path.is_dir()}})

    def forget(self, paths: Iterable[Path]) -> None:
        """The workload is here: what is there is its own again. Idempotent."""
        gone = {str(path) for path in paths}
        known = self._known()
        if gone & known.keys():
            self._write({path: each for path, each in known.items() if path not in gone})

    def _known(self) -> dict[str, list[int]]:
        try:
            known = json.loads(self._file.read_text())
        except (FileNotFoundError, ValueError):  # of a damaged file nothing is known
            return {}
        return known if isinstance(known, dict) else {}

    def _write(self, known: dict[str, list[int]]) -> None:
        if not known:
            self._file.unlink(missing_ok=True)
            return
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = self._file.with_suffix(".new")
        with new.open("w") as file:
            file.write(json.dumps(known))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._file)


def _identity(path: Path) -> list[int]:
    """The file system, which keeps its id over a reboot if it is on a disk (statvfs(3)), and the directory in it."""
    return [os.statvfs(path).f_fsid, path.stat().st_ino]
