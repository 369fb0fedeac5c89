"""Pure: are a workload's directories on the destination, or can they get there? Part of ``preflight``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from coordinator.facts import Tree, TreeFacts
from coordinator.findings import Finding, finding
from coordinator.move_facts import MoveFacts

_MIB = 1024 * 1024
#: Of what the source has in use: file systems store the same in different ways, and a service writes on.
_ROOM_FACTOR = 1.1


def file_findings(facts: MoveFacts, source: str) -> Iterator[Finding]:
    """Every tree with each end's own problems, then what the two ends are to each other."""
    ends = [host for host in (source, facts.destination) if host in facts.files]
    trees = facts.workloads[source].trees
    for host in ends:
        if any(tree.files == "sync" for tree in trees) and not facts.files[host].rsync:
            yield finding("RSYNC_MISSING", host, f"there is no rsync, to copy {_synced(trees)} with")
        for about in facts.files[host].trees:
            if about.problem:
                yield finding("FILES_UNUSABLE", host, about.problem)
    yield from _elsewhere(facts, source)
    if len(ends) < 2:
        return
    for tree, here, there in zip(trees, *(facts.files[host].trees for host in ends), strict=True):
        if not (here.problem or there.problem):
            yield from _tree(tree, here, there, facts.destination, facts.differing)


def _elsewhere(facts: MoveFacts, source: str) -> Iterator[Finding]:
    """What is copied or compared has to be what the container sees there. podman's are defined on each host anew."""
    here, there = facts.workloads[source], facts.workloads.get(facts.destination)
    if there is None or there.bundle_digest != here.bundle_digest:
        return
    places = {each.inside: each.path for each in there.trees}
    for tree in here.trees:
        if (place := places.get(tree.inside, "another directory")) != tree.path:
            message = f"{tree.inside} of the container is {tree.path} on {source}, and {place} there"
            yield finding("FILES_ELSEWHERE", facts.destination, message)


def first_difference(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """The first entry of two listings that is not the same, and how; empty if there is none."""
    for path in sorted(here.keys() | there.keys()):
        if here.get(path) == there.get(path):
            continue
        named = path.encode(errors="surrogateescape").decode(errors="replace")
        if path not in there:
            return f"{named} is missing there"
        if path not in here:
            return f"{named} is there alone"
        return f"{named} is another there (content, owner, mode or extended attributes)"
    return ""


def _tree(tree: Tree, here: TreeFacts, there: TreeFacts, host: str, differing: Mapping[str, str]) -> Iterator[Finding]:
    if here.state == "absent" or (there.state == "absent" and tree.files != "sync"):
        yield finding("FILES_MISSING", host, f"{tree.path} is not there")
    elif tree.files == "shared" and not there.probe_seen:
        yield finding("FILES_NOT_SHARED", host, f"a file that was made in {tree.path} on the source is not seen there")
    elif tree.files == "present" and (here.digest != there.digest or not here.digest):
        what = differing.get(tree.path) or "it changed while it was compared"
        yield finding("FILES_DIFFER", host, f"{tree.path} is not the source's: {what}")
    elif tree.files == "sync":
        yield from _synchronised(tree, here, there, host)


def _synchronised(tree: Tree, here: TreeFacts, there: TreeFacts, host: str) -> Iterator[Finding]:
    if there.state == "filled" and not there.left_over and not tree.root:
        message = f"{tree.path} exists, and what is in it was not left there by a move of this workload"
        yield finding("FILES_IN_THE_WAY", host, message)
        return
    needed = int(here.used_bytes * _ROOM_FACTOR) - there.used_bytes
    if needed > there.free_bytes:
        message = f"{tree.path} needs {-(-needed // _MIB)} MiB more, {there.free_bytes // _MIB} MiB are free"
        yield finding("DISK_FULL", host, message)
    elif (entries := here.entries - there.entries) > there.free_entries:
        yield finding("DISK_FULL", host, f"{tree.path} needs {entries} inodes more, {there.free_entries} are free")


def _synced(trees: tuple[Tree, ...]) -> str:
    return ", ".join(tree.path for tree in trees if tree.files == "sync")
