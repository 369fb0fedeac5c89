"""Control groups: every process of a lab is in a group of the lab, so that `down` ends exactly those.

livemove-lab-NAME/alpha        the root of alpha's own cgroup namespace
livemove-lab-NAME/alpha/init   its init, its sshd and everything started from outside
livemove-lab-NAME/clients      what runs on a machine that is only a network namespace
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from labs.commands import LabError

END_TIMEOUT_S = 10.0


def hierarchy() -> Path:
    """Where cgroup2 is mounted on this machine: of its own, or beside version 1."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, filesystem = line.partition(" - ")
        if filesystem.startswith("cgroup2 "):
            return Path(fields.split()[4])
    raise LabError("cgroup2 is not mounted on this machine; run: mount -t cgroup2 none /sys/fs/cgroup")


def of_lab(lab: str) -> Path:
    return hierarchy() / f"livemove-lab-{lab}"


def of_machine(lab: str, machine: str, *, is_host: bool) -> Path:
    """The group that processes started from outside join."""
    group = of_lab(lab) / machine
    return group / "init" if is_host else group


def make(lab: str, machine: str, *, is_host: bool) -> None:
    """Make a machine's group, and hand the controllers this machine gives the lab on to it.

    A host does the same for its containers, from inside: only groups without processes can.
    """
    of_machine(lab, machine, is_host=is_host).mkdir(parents=True)
    group = of_lab(lab)
    for controller in (group / "cgroup.controllers").read_text().split():
        with suppress(OSError):  # a controller less is a lab all the same
            (group / "cgroup.subtree_control").write_text(f"+{controller}")


def destroy(group: Path) -> None:
    """End every process in the group and below, and remove it. Nothing happens if it is not there."""
    if not group.exists():
        return
    (group / "cgroup.kill").write_text("1")
    deadline = time.monotonic() + END_TIMEOUT_S
    while "populated 1" in (group / "cgroup.events").read_text():
        if time.monotonic() > deadline:
            raise LabError(f"processes in {group} do not end; see: cat $(find {group} -name cgroup.procs)")
        time.sleep(0.005)
    below = sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True)
    for directory in [*below, group]:
        directory.rmdir()
