"""The protocol of a runtime: few verbs, each with what it presupposes, what it does and what undoes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from coordinator.agent.process import Command
from coordinator.facts import Obstacle


@dataclass(frozen=True, slots=True)
class Tasks:
    """A workload as its runtime sees it. ``root_pid`` is 0 unless it is running."""

    state: Literal["running", "stopped", "absent"]
    root_pid: int = 0


@dataclass(frozen=True, slots=True)
class Mount:
    """A file or directory of the host, ``path``, that a workload has at ``inside``; ``root``: as its root file system,
    with an empty path where the runtime keeps that by itself."""

    path: str
    inside: str
    writable: bool
    root: bool = False


@dataclass(frozen=True, slots=True)
class Definition:
    """What a restore needs of a workload on a host beside its tasks. ``digest`` is the same where it is the same;
    ``problem``: why it cannot be used; ``obstacles``: what of it cannot be moved; ``mounts``: what it has of the
    host's files, whether they are there or not; ``network``: the path of the network namespace it is to run in, if it
    names one."""

    present: bool = True
    digest: str = ""
    problem: str = ""
    obstacles: tuple[Obstacle, ...] = ()
    mounts: tuple[Mount, ...] = ()
    network: Path | None = None


class Runtime(Protocol):
    """One workload under one runtime on one host."""

    async def definition(self) -> Definition:
        """How the workload is defined here, whether it runs or not. Read-only."""

    async def find(self) -> Tasks:
        """Ask the runtime. Read-only."""

    async def prepare_restore(self) -> None:
        """Make sure that a restore can be attempted; raise ``RestoreFailed`` if not. Leaves nothing to undo."""

    def dump_command(self, tasks: Tasks, images: Path, work: Path, *, lazy: bool) -> Command:
        """The command that dumps the running tasks with their connections into ``images``, logs into ``work``;
        ``lazy``: without the pages that can be filled in later, which CRIU is told by our hook's configuration file;
        for a runtime that would tell it otherwise."""

    def restore_command(self, images: Path, work: Path, *, lazy: bool) -> Command:
        """The command that restores them, detached."""

    async def adopt(self) -> int:
        """Destination, after commit: check that the tasks run, tell whoever has to know on this host, and return the
        root pid here; raise ``RestoreFailed`` if they do not run. Idempotent."""

    async def forget(self) -> None:
        """Source, after commit, when the tasks are dead: remove what is kept of the workload here. Idempotent."""

    async def discard(self) -> None:
        """Destination, after an abort, when the tasks are dead: remove what a restore left. Idempotent."""
