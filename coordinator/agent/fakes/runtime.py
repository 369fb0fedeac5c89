"""A runtime that knows the workload of the ``World``."""

from __future__ import annotations

from pathlib import Path

from coordinator.agent.fakes.world import Life
from coordinator.agent.process import Command
from coordinator.agent.runtimes.base import Definition, Tasks
from coordinator.errors import CommandFailed, RestoreFailed

ROOT_PID = 100


class FakeRuntime:
    """A ``Runtime`` that knows the workload of the world."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._machine = life.machine

    async def find(self) -> Tasks:
        """See ``Runtime``."""
        await self._life.verb("runtime finds", CommandFailed("the runtime fails"))
        if self._machine.copy in ("running", "frozen"):
            return Tasks("running", ROOT_PID)
        return Tasks("absent")

    async def definition(self) -> Definition:
        """See ``Runtime``."""
        return Definition(digest="the same everywhere")

    async def prepare_restore(self) -> None:
        """See ``Runtime``."""
        await self._life.verb("runtime prepares", RestoreFailed("the runtime fails"))
        if self._machine.registered:
            raise RestoreFailed("this host has the workload already")

    def dump_command(self, tasks: Tasks, images: Path, work: Path, *, lazy: bool) -> Command:
        """See ``Runtime``."""
        return Command(("fake", "dump", str(tasks.root_pid), str(images), str(work), str(lazy)), {})

    def restore_command(self, images: Path, work: Path, *, lazy: bool) -> Command:
        """See ``Runtime``."""
        return Command(("fake", "restore", str(images), str(work), str(lazy)), {})

    async def adopt(self) -> int:
        """See ``Runtime``."""
        await self._life.verb("runtime adopts", RestoreFailed("the runtime fails"))
        if self._machine.copy != "running":
            raise RestoreFailed(f"after the restore the copy is {self._machine.copy}")
        await self._life.checkpoint()
        return ROOT_PID

    async def forget(self) -> None:
        """See ``Runtime``."""
        await self._remove("forgets")

    async def discard(self) -> None:
        """See ``Runtime``."""
        await self._remove("discards")

    async def _remove(self, verb: str) -> None:
        await self._life.verb(f"runtime {verb}", CommandFailed("the runtime fails"))
        if self._machine.copy != "absent" or self._machine.commands:
            self._life.world.broken.append(f"the runtime of {self._machine.name} {verb} tasks that are there")
        self._machine.registered = False
        await self._life.done(f"runtime {verb}")
