"""OCI runtimes with runc's command line: runc and crun."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

from coordinator.agent.control_group import CGROUPS, changed_limits, control_group
from coordinator.agent.process import Command, first_explaining_line, run
from coordinator.agent.runtimes.base import Definition, Mount, Tasks
from coordinator.errors import CommandFailed, ProtocolError, RestoreFailed
from coordinator.facts import Obstacle, WorkloadSpec

#: The word for a container whose tasks exist and may run. "paused" tasks would be restored paused.
_RUNNING = "running"

#: What they say of a container that they do not know, and crun of one whose status file is gone (libcrun/status.c).
_UNKNOWN = ("does not exist", "/status`: No such file or directory")

#: runc has to be told besides our hook's configuration file, because it overrules that with a "no" of its own
#: (runc, libcontainer/criu_linux.go: LazyPages). crun 1.28 knows nothing of it and leaves it to the file.
_LAZY_OPTION = {"runc": ("--lazy-pages",), "crun": ()}


class OciRuntime:
    """A container of ``runc`` or ``crun``, known by its id, restored from the bundle of the same path on both hosts."""

    def __init__(self, program: str, container: str, bundle: str) -> None:
        self._container = container
        self._bundle = bundle
        self._program = program

    async def definition(self) -> Definition:
        """See ``Runtime``: config.json, by the bytes of it."""
        found = bundle_definition(Path(self._bundle))
        changed = changed_limits(self._program, Path(self._bundle), self._container)
        return replace(found, obstacles=(*found.obstacles, *changed))

    async def find(self) -> Tasks:
        """See ``Runtime``. One without its state file is absent to both; it can be removed, and nothing else."""
        done = await run([self._program, "state", self._container])
        if done.status != 0:
            if any(words in done.stderr for words in _UNKNOWN):
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

    def _options(self, images: Path, work: Path, lazy: bool) -> tuple[str, ...]:
        folders = ("--image-path", str(images), "--work-path", str(work))
        return (*folders, "--tcp-established", "--file-locks", *(_LAZY_OPTION[self._program] if lazy else ()))

    async def adopt(self) -> int:
        """See ``Runtime``. The runtime itself has recorded the container: runc at its post-restore notification, crun
        when CRIU had ended."""
        tasks = await self.find()
        if tasks.state != "running":
            raise RestoreFailed(f"after the restore {self._program} says that {self._container} is {tasks.state}")
        return tasks.root_pid

    async def forget(self) -> None:
        """See ``Runtime``. After a checkpoint the runtime removes the container by itself, unless it was cut short."""
        await self._delete()

    async def discard(self) -> None:
        """See ``Runtime``."""
        await self._delete()

    async def _delete(self) -> None:
        done = await run([self._program, "delete", "--force", self._container])
        if done.status != 0 and not any(words in done.stderr for words in _UNKNOWN):
            done.checked()


def oci_runtime_of(workload: WorkloadSpec) -> OciRuntime:
    """The runtime of a workload that names one of ``OCI_RUNTIMES``."""
    if workload.container is None or workload.bundle is None:
        raise ProtocolError(f"workload {workload.name}: a {workload.runtime} workload has a container and a bundle")
    return OciRuntime(workload.runtime, workload.container, workload.bundle)


def bundle_definition(bundle: Path) -> Definition:
    """What a bundle says of its container (OCI runtime specification, config.md)."""
    file = bundle / "config.json"
    try:
        content = file.read_bytes()
        config = json.loads(content)
        root = bundle / config["root"]["path"]
        mounts = [Mount(os.path.normpath(root), "/", not config["root"].get("readonly", False), root=True)]
        for each in config.get("mounts", ()):
            if {"bind", "rbind"} & set(options := each.get("options", ())):
                source = os.path.normpath(bundle / each["source"])
                mounts.append(Mount(source, os.path.normpath(each["destination"]), "ro" not in options))
        linux = config.get("linux", {})
        devices = [each["path"] for each in linux.get("devices") or ()]
        networks = [each.get("path") for each in linux.get("namespaces") or () if each["type"] == "network"]
    except FileNotFoundError:
        return Definition(present=False, problem=f"{file} does not exist")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Definition(present=False, problem=f"{file} is no OCI runtime configuration: {error}")
    return Definition(
        digest=hashlib.sha256(content).hexdigest(),
        problem="" if root.is_dir() and any(root.iterdir()) else f"{root} is not there or empty",
        obstacles=host_devices(devices),
        mounts=tuple(mounts),
        network=Path(networks[0]) if networks and networks[0] else None,
    )


def host_devices(paths: list[str]) -> tuple[Obstacle, ...]:
    """Devices of the host that a container is given; what CRIU knows of (/dev/null and the like) need not be given."""
    message = f"the container has devices of its host: {', '.join(paths)}"
    hint = "Run the service without them: what such a device holds cannot be moved."
    return (Obstacle(code="HOST_DEVICES", message=message, hint=hint),) if paths else ()


def stray_processes(bundle: Path, container: str, cgroups: Path = CGROUPS) -> list[int]:
    """The processes in a container's control group: if its runtime does not know it, they are all that is left of it.

    Empty where the group cannot be told (``control_group``)."""
    group = control_group(bundle, container, cgroups)
    if group is None:
        return []
    return sorted(int(pid) for file in group.rglob("cgroup.procs") for pid in file.read_text().split())
