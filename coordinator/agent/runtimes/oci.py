"""OCI runtimes with runc's command line."""

from __future__ import annotations

import json
from pathlib import Path

from coordinator.agent.process import Command, first_explaining_line, run
from coordinator.agent.runtimes.base import Tasks
from coordinator.errors import CommandFailed, ProtocolError, RestoreFailed
from coordinator.facts import WorkloadSpec

#: runc's word for a container whose tasks exist and may run. "paused" tasks would be restored paused.
_RUNNING = "running"


class OciRuntime:
    """A container of ``runc``, known by its id, restored from the bundle of the same path on both hosts."""

    def __init__(self, workload: WorkloadSpec, program: str = "runc") -> None:
        if workload.container is None or workload.bundle is None:
            raise ProtocolError(f"workload {workload.name}: a {program} workload has a container and a bundle")
        self._container = workload.container
        self._bundle = workload.bundle
        self._program = program

    async def find(self) -> Tasks:
        """See ``Runtime``. runc(8) state: exit status 1 and "does not exist" for a container it does not know."""
        done = await run([self._program, "state", self._container])
        if done.status != 0:
            if "does not exist" in done.stderr:
                return Tasks("absent")
            raise CommandFailed(f"{done.command}: exit status {done.status}: {first_explaining_line(done.stderr)}")
        state = json.loads(done.stdout)
        if state["status"] == _RUNNING:
            return Tasks("running", int(state["pid"]))
        return Tasks("stopped")

    async def prepare_restore(self) -> None:
        """See ``Runtime``."""
        if (await self.find()).state != "absent":
            raise RestoreFailed(
                f"this host has a container {self._container} already",
                f"Remove it there if it is a remainder: {self._program} delete {self._container}",
            )
        if not (Path(self._bundle) / "config.json").is_file():
            raise RestoreFailed(f"no bundle at {self._bundle}", "Copy the bundle there, or correct `bundle`.")

    def dump_command(self, tasks: Tasks, images: Path, work: Path, *, lazy: bool) -> Command:
        """See ``Runtime``."""
        return Command((self._program, "checkpoint", *self._options(images, work, lazy), self._container), {})

    def restore_command(self, images: Path, work: Path, *, lazy: bool) -> Command:
        """See ``Runtime``."""
        options = ("--detach", "--bundle", self._bundle, *self._options(images, work, lazy))
        return Command((self._program, "restore", *options, self._container), {})

    @staticmethod
    def _options(images: Path, work: Path, lazy: bool) -> tuple[str, ...]:
        folders = ("--image-path", str(images), "--work-path", str(work))
        return (*folders, "--tcp-established", "--file-locks", *(("--lazy-pages",) if lazy else ()))

    async def adopt(self) -> int:
        """See ``Runtime``. runc itself has recorded the container, at its post-restore notification."""
        tasks = await self.find()
        if tasks.state != "running":
            raise RestoreFailed(f"after the restore {self._program} says that {self._container} is {tasks.state}")
        return tasks.root_pid

    async def forget(self) -> None:
        """See ``Runtime``. After a checkpoint runc removes the container by itself, unless it was cut short."""
        await self._delete()

    async def discard(self) -> None:
        """See ``Runtime``."""
        await self._delete()

    async def _delete(self) -> None:
        done = await run([self._program, "delete", "--force", self._container])
        if done.status != 0 and "does not exist" not in done.stderr:
            done.checked()
