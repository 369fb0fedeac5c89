"""podman, as root, over crun: a container that is created on both hosts and runs on one.

podman's own checkpoint writes all memory into an archive, and holds the container's lock meanwhile. So on the source we
drive the runtime below podman, and podman's monitor sees the container end. On the destination podman itself restores
the container that was created there (libpod/container_internal_common.go, restore): it starts a monitor, which starts
crun in our environment and takes the container's output. So podman knows the container from its first moment there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coordinator.agent.process import Command, first_explaining_line, run
from coordinator.agent.runtimes.base import Definition, Mount, Tasks
from coordinator.agent.runtimes.oci import OciRuntime, host_devices
from coordinator.errors import CommandFailed, ProtocolError, RestoreFailed
from coordinator.facts import Obstacle, WorkloadSpec

#: podman has its own folders for images and for what CRIU has in its working directory, both beside the container's
#: config.json: there they are links to ours. It wants an inventory.img when it starts; the real one overwrites it.
_IMAGES, _WORK = "checkpoint", ("lazy-pages.socket", "restore.log")
_RESTORE = f"""\
set -e
for each in {" ".join(_WORK)}; do ln -sf "$0/$each" "$2"; done
ln -sfn "$1" "$2/{_IMAGES}"
touch "$1/inventory.img"
exec podman container restore --keep --tcp-established --file-locks "$3"
"""

#: Of ``podman container inspect``: a container that has not run yet, or that has ended.
_AT_REST = ("created", "configured", "exited")

#: What has to be the same on both hosts of the container's HostConfig.
_HOST_SETTINGS = (
    "ReadonlyRootfs",
    "Privileged",
    "CapAdd",
    "CapDrop",
    "SecurityOpt",
    "UsernsMode",
    "PidMode",
    "IpcMode",
    "NetworkMode",
    "Tmpfs",
)


class PodmanRuntime:
    """A container of podman, known by its name, which is the same on both hosts while its id is not."""

    def __init__(self, workload: WorkloadSpec) -> None:
        if workload.container is None:
            raise ProtocolError(f"workload {workload.name}: a podman workload has a container")
        self._name = workload.container
        self._about: dict[str, Any] | None = None

    async def _inspect(self) -> dict[str, Any] | None:
        done = await run(["podman", "container", "inspect", self._name])
        if done.status == 0:
            self._about = json.loads(done.stdout)[0]
        elif "no such container" in done.stderr:
            self._about = None
        else:
            raise CommandFailed(f"{done.command}: exit status {done.status}: {first_explaining_line(done.stderr)}")
        return self._about

    async def find(self) -> Tasks:
        """See ``Runtime``. A container at rest is what a destination has: its tasks are absent."""
        about = await self._inspect()
        if about is None or about["State"]["Status"] in _AT_REST:
            return Tasks("absent")
        if about["State"]["Status"] == "running":
            return Tasks("running", int(about["State"]["Pid"]))
        return Tasks("stopped")

    async def definition(self) -> Definition:
        """See ``Runtime``: what podman says of the container."""
        about = await self._inspect()
        if about is None:
            return Definition(present=False, problem=f"podman has no container {self._name} on this host")
        obstacles = (*obstacles_of(about), *_shm(about), *unused_terminal(about))
        network = network_of(about)
        return Definition(digest=digest_of(about), obstacles=obstacles, mounts=mounts_of(about), network=network)

    async def prepare_restore(self) -> None:
        """See ``Runtime``. A container that never ran is initialised once, because podman restores only one that has
        its config.json: it is "exited" then, without that anything of the service has run."""
        if (await self.find()).state != "absent":
            raise RestoreFailed(
                f"this host has a container {self._name} already, and it is not at rest",
                f"Stop it there if it is a remainder: podman stop {self._name}",
            )
        if self._about is None:
            raise RestoreFailed(f"podman has no container {self._name}", "Create it as on the source: podman create.")
        if not (Path(self._about["StaticDir"]) / "config.json").is_file():
            (await run(["podman", "init", self._name])).checked()
            (await run(["podman", "stop", "--time", "0", self._name])).checked()

    def dump_command(self, tasks: Tasks, images: Path, work: Path, *, lazy: bool) -> Command:
        """See ``Runtime``. Precondition: ``find``."""
        return self._below().dump_command(tasks, images, work, lazy=lazy)

    def restore_command(self, images: Path, work: Path, *, lazy: bool) -> Command:
        """See ``Runtime``. Precondition: ``prepare_restore``."""
        assert self._about is not None
        return Command(("sh", "-c", _RESTORE, str(work), str(images), self._about["StaticDir"], self._name), {})

    def _below(self) -> OciRuntime:
        """The container as the OCI runtime knows it."""
        assert self._about is not None
        return OciRuntime(self._about["OCIRuntime"], self._about["Id"], self._about["StaticDir"])

    async def adopt(self) -> int:
        """See ``Runtime``. podman recorded the container when its restore ended."""
        tasks = await self.find()
        if tasks.state != "running":
            raise RestoreFailed(f"after the restore podman says that {self._name} is {tasks.state}")
        self._remove_links()
        return tasks.root_pid

    async def forget(self) -> None:
        """See ``Runtime``. What stays is a container at rest, as ``podman create`` makes it, that may come back."""
        await self._clean()

    async def discard(self) -> None:
        """See ``Runtime``."""
        await self._clean()

    async def _clean(self) -> None:
        """Have podman see that the tasks have ended, if its monitor has not told it yet."""
        if await self._inspect() is not None:
            self._remove_links()
            await self._below().discard()
            (await run(["podman", "container", "cleanup", self._name])).checked()

    def _remove_links(self) -> None:
        assert self._about is not None
        for name in (_IMAGES, *_WORK):
            link = Path(self._about["StaticDir"]) / name
            if link.is_symlink():
                link.unlink()


def digest_of(about: dict[str, Any]) -> str:
    """A digest of what makes two containers of ``podman create`` the same; their ids are not (pure)."""
    mounts = [(each["Type"], each["Destination"], each["RW"]) for each in about["Mounts"]]
    settings = {name: about["HostConfig"].get(name) for name in _HOST_SETTINGS}
    what = [
        about["Image"],
        about["Rootfs"],
        about["OCIRuntime"],
        about["Path"],
        about["Args"],
        sorted(mounts),
        settings,
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def mounts_of(about: dict[str, Any]) -> tuple[Mount, ...]:
    """What a container has of the host's files (pure); its root file system is podman's own."""
    root = Mount("", "/", not about["HostConfig"].get("ReadonlyRootfs", False), root=True)
    volumes = [each for each in about["Mounts"] if each["Type"] in ("bind", "volume")]
    return (root, *(Mount(each["Source"], each["Destination"], each["RW"]) for each in volumes))


def network_of(about: dict[str, Any]) -> Path | None:
    """The network namespace that a container was given by its path (pure): podman does nothing to it."""
    kind, _, path = str(about["HostConfig"].get("NetworkMode") or "").partition(":")
    return Path(path) if kind == "ns" else None


def obstacles_of(about: dict[str, Any]) -> tuple[Obstacle, ...]:
    """What of a container cannot be moved (pure)."""
    settings, named = about["HostConfig"], f"podman's container {about['Name']}"
    found = [*host_devices([each["PathOnHost"] for each in settings.get("Devices") or ()])]
    if about.get("Pod"):
        message = f"{named} is in the pod {about['Pod'][:12]}"
        found.append(Obstacle(code="IN_A_POD", message=message, hint="Run it by itself."))
    if about["OCIRuntime"] != "crun":
        hint = "Create it on both hosts with: podman --runtime crun create."
        found.append(Obstacle(code="PODMAN_RUNTIME", message=f"{named} runs under {about['OCIRuntime']}", hint=hint))
    for option, why in (*_options(settings), *_layered(about["Mounts"])):
        hint = f"Create it on both hosts without {option}."
        found.append(Obstacle(code="PODMAN_OPTION", message=f"{named} has {option}: {why}", hint=hint))
    policy = (settings.get("RestartPolicy") or {}).get("Name") or "no"
    if policy != "no" or settings.get("AutoRemove"):
        option = f"--restart={policy}" if policy != "no" else "--rm"
        hint = "Turn it off on both hosts: podman update --restart=no; without --rm."
        found.append(Obstacle(code="PODMAN_RESTARTS", message=f"{named} has {option}", hint=hint))
    return tuple(found)


def _options(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if settings.get("Cgroups") == "disabled":
        # crun then names CRIU the top of the hierarchy: seen from within a container that is a host, all of the host.
        yield "--cgroups=disabled", "instead of the container CRIU would freeze all there is"
    driver = (settings.get("LogConfig") or {}).get("Type") or ""
    if driver.startswith("passthrough"):
        yield f"--log-driver={driver}", "its output goes to who started it, and stays with this host"


def _layered(mounts: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Volumes with a layer of podman's own above them, which is in its folder of this container on this host."""
    for each in mounts:
        if any(option.startswith("upperdir=") for option in each.get("Options") or ()):
            yield (
                f"--volume=…:{each['Destination']}:O",
                "what it writes there stays with this host, below an id of podman's",
            )


def unused_terminal(about: dict[str, Any], proc: Path = Path("/proc")) -> tuple[Obstacle, ...]:
    """A terminal that the service has closed is in no image, and podman's monitor would wait for it in vain."""
    if not about["Config"].get("Tty") or about["State"]["Status"] != "running":
        return ()
    try:
        targets = [str(each.readlink()) for each in (proc / str(about["State"]["Pid"]) / "fd").iterdir()]
    except OSError:
        return ()  # it ended, or closed a descriptor, while we looked
    if any(target.startswith(("/dev/pts/", "/dev/console")) for target in targets):
        return ()
    message = f"podman's container {about['Name']} has --tty, and its first process has closed the terminal"
    return (Obstacle(code="PODMAN_OPTION", message=message, hint="Create it on both hosts without --tty."),)


def _shm(about: dict[str, Any]) -> tuple[Obstacle, ...]:
    """/dev/shm is a mount of podman's, from outside the container: CRIU leaves its files behind."""
    folder = Path(about["StaticDir"]) / "shm"
    if not folder.is_dir() or not any(folder.iterdir()):
        return ()
    message = f"podman's container {about['Name']} has files in /dev/shm, which is {folder} of the host"
    hint = "Give it one of its own: --mount type=tmpfs,destination=/dev/shm."
    return (Obstacle(code="PODMAN_SHM", message=message, hint=hint),)
