"""The lab's containers under podman: created on every host, from the host's own root file system, running on one.

podman on a lab host keeps whole copies of layers (`vfs`): an overlay cannot stand on the host's own. A limit on
processes, podman's default, is left out, because a host may lack the controller.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from labs import config, oci
from labs.machines import Host

STORAGE = """\
[storage]
driver = "vfs"
runroot = "/run/containers/storage"
graphroot = "/var/lib/containers/storage"
"""
CONTAINERS = "[containers]\npids_limit = 0\n"


def install(
    machine: Host,
    workload: config.Workload,
    command: Sequence[str],
    environment: Mapping[str, str],
    more: Sequence[str] = (),
) -> None:
    """Create the container, as it now is to be; `more`: options beside those of every one. Undo: `uninstall`."""
    assert workload.container
    rootfs = prepare(machine, workload.container)
    network = f"ns:/run/netns/{workload.netns}" if workload.netns else "host"
    options = ["--name", workload.container, "--network", network, "--read-only", "--hostname", workload.name]
    options += [*(f"--env={name}={value}" for name, value in environment.items()), *more]
    with _some_namespace(machine, workload.netns):
        machine.run(["podman", "create", *options, "--rootfs", rootfs, *command])


@contextmanager
def _some_namespace(machine: Host, name: str) -> Iterator[None]:
    """podman creates no container for a namespace that is not there."""
    if name:
        machine.run(["ip", "netns", "add", name])
    try:
        yield
    finally:
        if name:
            machine.run(["ip", "netns", "delete", name])


def prepare(machine: Host, container: str) -> str:
    """Make sure that podman can be used and has no such container; returns a root for it. Undo: `uninstall`."""
    machine.write_file("/etc/containers/storage.conf", STORAGE)
    machine.write_file("/etc/containers/containers.conf", CONTAINERS)
    rootfs = f"/srv/{container}/rootfs"
    machine.run(["sh", "-c", oci.ROOT.format(rootfs=rootfs)])
    remove(machine, container)
    return rootfs


def uninstall(machine: Host, workload: config.Workload) -> None:
    """Remove the container and its root."""
    assert workload.container
    remove(machine, workload.container)
    machine.run(["sh", "-c", f"umount /srv/{workload.container}/rootfs && rm -r /srv/{workload.container}"])


def remove(machine: Host, container: str) -> None:
    """Remove the container, if there is one."""
    machine.run(["podman", "rm", "--force", "--ignore", "--time", "0", container])


def end(machine: Host, workload: config.Workload) -> None:
    """Stop the container, if there is one: it stays, at rest."""
    assert workload.container
    machine.run(["podman", "stop", "--ignore", "--time", "0", workload.container], check=False)


def status(machine: Host, container: str) -> str:
    """What podman says of it, empty if it has none of that name."""
    done = machine.run(["podman", "container", "inspect", "--format", "{{.State.Status}}", container], check=False)
    return done.stdout.strip()
