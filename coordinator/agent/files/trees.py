"""Pure: which directories of the host hold files of a workload, and how each gets to the other host."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from coordinator.agent.runtimes.base import Mount
from coordinator.facts import FilesKind, Obstacle, Tree, WorkloadSpec


def trees_of(workload: WorkloadSpec, mounts: Sequence[Mount]) -> tuple[Tree, ...]:
    """The trees that somebody has to look at: what the workload can write to goes as ``files`` says, what it can only
    read has to be ``present`` if that is what ``files`` says, and a volume of the configuration goes its own way."""
    volumes = {each.path: each.files for each in workload.volumes}
    found: dict[str, Tree] = {}
    for mount in mounts:
        usual = workload.files if mount.writable or workload.files == "present" else "unchecked"
        kind: FilesKind = volumes.pop(mount.path, usual)
        if kind != "unchecked" and mount.path:
            found.setdefault(mount.path, Tree(path=mount.path, inside=mount.inside, files=kind, root=mount.root))
    if workload.runtime == "process":
        for path, kind in volumes.items():
            if kind != "unchecked":
                found[path] = Tree(path=path, inside=path, files=kind)
    return tuple(found.values())


def tree_obstacles(workload: WorkloadSpec, mounts: Sequence[Mount]) -> tuple[Obstacle, ...]:
    """Volumes that the workload does not have, and a root file system that stays behind."""
    known = {mount.path for mount in mounts}
    found = [
        Obstacle(
            code="VOLUME_NOT_MOUNTED",
            message=f"{volume.path} is no directory that the container has mounted (it has: {_names(known)})",
            hint="Correct `path` in the workload's volumes: it is the host's path, as the container's mount has it.",
        )
        for volume in workload.volumes
        if workload.runtime != "process" and volume.path not in known
    ]
    if workload.files in ("shared", "sync") and any(each.root and each.writable and not each.path for each in mounts):
        message = f"{workload.runtime} keeps the container's root file system by itself, and the container writes to it"
        hint = "Create the container with --read-only, and with volumes for what it writes."
        found.append(Obstacle(code="ROOT_STAYS", message=message, hint=hint))
    return tuple(found)


def missing_source(mounts: Iterable[Mount], trees: Iterable[Tree]) -> str:
    """What cannot be mounted on a host because it is not there, and nobody will copy it there."""
    copied = {tree.path for tree in trees if tree.files == "sync"}
    for mount in mounts:
        if not mount.root and mount.path not in copied and not os.path.lexists(mount.path):
            return f"{mount.path} is not there, which is to be mounted on {mount.inside}"
    return ""


def outside_path(inside: str, trees: Iterable[Tree]) -> tuple[Tree, str] | None:
    """The tree that a path of the workload's belongs to, and the path within the tree."""
    path = PurePosixPath(inside)
    below = [tree for tree in trees if path.is_relative_to(tree.inside)]
    if not below:
        return None
    tree = max(below, key=lambda each: len(PurePosixPath(each.inside).parts))
    return tree, str(path.relative_to(tree.inside))


def _names(paths: Iterable[str]) -> str:
    return ", ".join(sorted(filter(None, paths))) or "none"
