"""What runtimes say of a container, as definitions and obstacles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.agent.files.trees import missing_source
from coordinator.agent.obstacles import obstacles
from coordinator.agent.runtimes.base import Mount
from coordinator.agent.runtimes.oci import bundle_definition
from coordinator.agent.runtimes.podman import digest_of, obstacles_of, unused_terminal
from coordinator.facts import RuntimeName, WorkloadSpec
from coordinator.obstacles import OBSTACLES

ABOUT: dict[str, Any] = {
    "Id": "4a5b",
    "Name": "cache",
    "Image": "sha256:1",
    "Rootfs": "",
    "Path": "redis-server",
    "Args": ["--port", "6379"],
    "OCIRuntime": "crun",
    "Pod": "",
    "Mounts": [{"Type": "bind", "Source": "/a", "Destination": "/data", "RW": True}],
    "HostConfig": {"RestartPolicy": {"Name": "no"}, "AutoRemove": False, "Devices": [], "ReadonlyRootfs": True},
}


#: What podman 5.8 says of --volume=/srv/a:/mnt:O when it has started the container.
LAYERED = {
    "Type": "bind",
    "Source": "/var/lib/containers/7/overlay/1/merge",
    "Destination": "/mnt",
    "RW": True,
    "Options": ["lowerdir=/srv/a", "upperdir=/var/lib/containers/7/overlay/1/upper", "workdir=/var/lib/containers/7/w"],
}


def changed(**host_config: object) -> dict[str, Any]:
    return {**ABOUT, "HostConfig": {**ABOUT["HostConfig"], **host_config}}


def codes(about: dict[str, Any]) -> list[str]:
    return [each.code for each in obstacles_of(about)]


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        (ABOUT, []),
        ({**ABOUT, "Pod": "7" * 64}, ["IN_A_POD"]),
        ({**ABOUT, "OCIRuntime": "runc"}, ["PODMAN_RUNTIME"]),
        (changed(RestartPolicy={"Name": "always"}), ["PODMAN_RESTARTS"]),
        (changed(RestartPolicy={"Name": ""}), []),
        (changed(AutoRemove=True), ["PODMAN_RESTARTS"]),
        (changed(Devices=[{"PathOnHost": "/dev/dri"}]), ["HOST_DEVICES"]),
        (changed(Cgroups="disabled"), ["PODMAN_OPTION"]),
        (changed(LogConfig={"Type": "passthrough"}), ["PODMAN_OPTION"]),
        ({**ABOUT, "Mounts": [LAYERED]}, ["PODMAN_OPTION"]),
    ],
)
def test_what_of_podmans_container_cannot_move(about: dict[str, Any], expected: list[str]) -> None:
    assert codes(about) == expected
    assert set(expected) <= OBSTACLES.keys()


def test_a_terminal_has_to_be_open(tmp_path: Path) -> None:
    about = {**ABOUT, "Config": {"Tty": True}, "State": {"Status": "running", "Pid": 7}}
    (tmp_path / "7/fd").mkdir(parents=True)
    (tmp_path / "7/fd/0").symlink_to("/dev/null")
    (found,) = unused_terminal(about, tmp_path)
    assert (found.code, found.hint) == ("PODMAN_OPTION", "Create it on both hosts without --tty.")
    assert unused_terminal({**about, "Config": {"Tty": False}}, tmp_path) == ()
    assert unused_terminal({**about, "State": {"Status": "exited", "Pid": 0}}, tmp_path) == ()
    assert unused_terminal({**about, "State": {"Status": "running", "Pid": 8}}, tmp_path) == ()
    (tmp_path / "7/fd/1").symlink_to("/dev/pts/0")
    assert unused_terminal(about, tmp_path) == ()


def test_the_digest_is_of_what_has_to_be_the_same() -> None:
    same = {**ABOUT, "Id": "9f", "Name": "other"}
    assert digest_of(same) == digest_of(ABOUT)
    for other in ({**ABOUT, "Image": "sha256:2"}, {**ABOUT, "Args": []}, changed(ReadonlyRootfs=False)):
        assert digest_of(other) != digest_of(ABOUT)


def bundle(folder: Path, **more: object) -> Path:
    (folder / "rootfs/etc").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"root": {"path": "rootfs"}, **more}))
    return folder


def test_a_bundle_is_known_by_its_configuration(tmp_path: Path) -> None:
    known = bundle_definition(bundle(tmp_path))
    assert (known.present, known.problem, known.obstacles) == (True, "", ())
    (tmp_path / "config.json").write_text(json.dumps({"root": {"path": "rootfs"}, "hostname": "other"}))
    assert bundle_definition(tmp_path).digest != known.digest
    (tmp_path / "rootfs/etc").rmdir()
    assert "not there or empty" in bundle_definition(tmp_path).problem


def test_a_bundle_that_is_none(tmp_path: Path) -> None:
    assert not bundle_definition(tmp_path).present
    for text in ("", "[]", "{}", '{"root": {"path": "r"}, "mounts": [{"options": ["bind"]}]}'):
        (tmp_path / "config.json").write_text(text)
        assert not bundle_definition(tmp_path).present


def test_what_is_mounted_has_to_be_there(tmp_path: Path) -> None:
    there = {"destination": "/data", "source": str(tmp_path), "options": ["rbind"]}
    missing = {"destination": "/more", "source": str(tmp_path / "x"), "options": ["bind", "ro"]}
    other = {"destination": "/tmp", "source": "tmpfs", "type": "tmpfs"}
    known = bundle_definition(bundle(tmp_path, mounts=[there, missing, other]))
    root, *volumes = known.mounts
    assert root == Mount(str(tmp_path / "rootfs"), "/", writable=True, root=True)
    assert volumes == [Mount(str(tmp_path), "/data", True), Mount(str(tmp_path / "x"), "/more", False)]
    assert "is to be mounted on /more" in missing_source(known.mounts, ())


def test_devices_of_the_host_are_told(tmp_path: Path) -> None:
    (obstacle,) = bundle_definition(bundle(tmp_path, linux={"devices": [{"path": "/dev/kfd"}]})).obstacles
    assert obstacle.code == "HOST_DEVICES"
    assert "/dev/kfd" in obstacle.message


@pytest.mark.parametrize(
    ("runtime", "pid", "found"),
    [
        ("process", 7, ["EXTERNAL_PIPE"]),
        ("process", 8, ["EXTERNAL_PIPE"]),
        ("runc", 7, ["EXTERNAL_PIPE"]),
        ("runc", 8, []),
        ("crun", 7, ["EXTERNAL_PIPE"]),
        ("podman", 7, []),
    ],
)
def test_standard_streams_that_lead_outside(tmp_path: Path, runtime: RuntimeName, pid: int, found: list[str]) -> None:
    """A container's other processes have pipes to each other; podman's monitor reads those of the first."""
    for each in (7, 8):
        (tmp_path / f"{each}/fd").mkdir(parents=True)
    (tmp_path / f"{pid}/fd/1").symlink_to("pipe:[1]")
    workload = WorkloadSpec(name="w", runtime=runtime, addresses=())
    assert [each.code for each in obstacles(workload, [7, 8], (), tmp_path)] == found


def test_a_file_outside_the_container_is_told(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    for name in ("fd", "fdinfo"):
        (tmp_path / "7" / name).mkdir(parents=True)
    (tmp_path / "7/fd/1").symlink_to(tmp_path / "log")
    (tmp_path / "7/fdinfo/1").write_text("pos:\t0\nflags:\t0100001\nmnt_id:\t31\n")
    workload = WorkloadSpec(name="w", runtime="runc", addresses=())
    for mounts, found in (("30 1 0:1 / / rw\n", ["FILE_OUTSIDE"]), ("31 1 0:1 / / rw\n", [])):
        (tmp_path / "7/mountinfo").write_text(mounts)
        assert [each.code for each in obstacles(workload, [7], (), tmp_path)] == found


def test_a_user_namespace_is_told(tmp_path: Path) -> None:
    for process in ("self", "7"):
        (tmp_path / process / "ns").mkdir(parents=True)
    (tmp_path / "self/ns/user").symlink_to("user:[1]")
    workload = WorkloadSpec(name="w", runtime="crun", addresses=())
    for link, found in (("user:[1]", []), ("user:[2]", ["USER_NAMESPACE"])):
        (tmp_path / "7/ns/user").unlink(missing_ok=True)
        (tmp_path / "7/ns/user").symlink_to(link)
        assert [each.code for each in obstacles(workload, [7], (), tmp_path)] == found
