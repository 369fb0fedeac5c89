"""Which directories of a workload somebody has to look at, and how each goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.agent.files.trees import missing_source, outside_path, tree_obstacles, trees_of
from coordinator.agent.runtimes.base import Mount
from coordinator.facts import FilesKind, RuntimeName, Tree, VolumeSpec, WorkloadSpec

MOUNTS = (
    Mount("/b/rootfs", "/", writable=False, root=True),
    Mount("/srv/data", "/data", writable=True),
    Mount("/etc/ssl", "/ssl", writable=False),
)


def workload(files: FilesKind, *volumes: VolumeSpec, runtime: RuntimeName = "runc") -> WorkloadSpec:
    return WorkloadSpec(name="w", runtime=runtime, addresses=("192.0.2.200/24",), files=files, volumes=volumes)


def kinds(spec: WorkloadSpec, mounts: tuple[Mount, ...] = MOUNTS) -> dict[str, str]:
    return {tree.path: tree.files for tree in trees_of(spec, mounts)}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ("unchecked", {}),
        ("shared", {"/srv/data": "shared"}),
        ("sync", {"/srv/data": "sync"}),
        ("present", {"/b/rootfs": "present", "/srv/data": "present", "/etc/ssl": "present"}),
    ],
)
def test_what_can_be_written_goes_as_the_workload_says(files: FilesKind, expected: dict[str, str]) -> None:
    assert kinds(workload(files)) == expected


def test_a_volume_goes_its_own_way() -> None:
    volumes = (VolumeSpec(path="/etc/ssl", files="present"), VolumeSpec(path="/srv/data", files="unchecked"))
    assert kinds(workload("sync", *volumes)) == {"/etc/ssl": "present"}
    assert tree_obstacles(workload("sync", *volumes), MOUNTS) == ()


def test_a_root_that_is_written_to_is_a_tree() -> None:
    root = Mount("/b/rootfs", "/", writable=True, root=True)
    assert trees_of(workload("sync"), (root,)) == (Tree(path="/b/rootfs", inside="/", files="sync", root=True),)


def test_a_process_has_the_volumes_it_is_said_to_have() -> None:
    volumes = (VolumeSpec(path="/srv/data", files="sync"), VolumeSpec(path="/srv/more", files="unchecked"))
    spec = workload("unchecked", *volumes, runtime="process")
    assert kinds(spec, ()) == {"/srv/data": "sync"}
    assert tree_obstacles(spec, ()) == ()


def test_what_cannot_be_done_is_an_obstacle() -> None:
    (obstacle,) = tree_obstacles(workload("sync", VolumeSpec(path="/srv/dta", files="sync")), MOUNTS)
    assert (obstacle.code, "/srv/dta" in obstacle.message) == ("VOLUME_NOT_MOUNTED", True)
    kept = Mount("", "/", writable=True, root=True)
    assert [each.code for each in tree_obstacles(workload("sync"), (kept,))] == ["ROOT_STAYS"]
    assert tree_obstacles(workload("present"), (kept,)) == ()
    assert kinds(workload("present"), (kept,)) == {}


def test_what_is_copied_need_not_be_there(tmp_path: Path) -> None:
    mounts = (Mount(str(tmp_path), "/here", writable=True), Mount(str(tmp_path / "x"), "/data", writable=True))
    assert "/x is not there, which is to be mounted on /data" in missing_source(mounts, ())
    assert missing_source(mounts, trees_of(workload("sync"), mounts)) == ""


def test_a_path_of_the_workload_is_found_in_the_nearest_tree() -> None:
    root, data = Tree(path="/b", inside="/", files="sync"), Tree(path="/srv/d", inside="/data", files="sync")
    assert outside_path("/data/a/b", (root, data)) == (data, "a/b")
    assert outside_path("/data", (root, data)) == (data, ".")
    assert outside_path("/database", (root, data)) == (root, "database")
    assert outside_path("/database", (data,)) is None
