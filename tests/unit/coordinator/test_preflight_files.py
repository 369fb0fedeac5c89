"""Directories of a workload on two hosts, and the findings they lead to; also how the two hosts are asked."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.compare_files import compare_files
from coordinator.errors import ProtocolError
from coordinator.facts import FilesFacts, FilesKind, Tree, TreeFacts, WorkloadSpec
from coordinator.fakes import FakeHost, FakeHosts, healthy_facts
from coordinator.move_facts import MoveFacts
from coordinator.preflight_files import file_findings, first_difference
from coordinator.protocol import DescribeFiles, Done, Listing, ListTree, WithdrawProbes
from tests.unit.coordinator.samples import CIDR, RUNNING, configuration

PATH = "/srv/data"
COUNTER = WorkloadSpec(name="counter", runtime="runc", container="counter", bundle="/srv/counter", addresses=(CIDR,))
HERE = TreeFacts(path=PATH, state="filled", used_bytes=100 << 20, entries=50, digest="1", free_bytes=1, free_entries=1)
THERE = TreeFacts(path=PATH, state="absent", free_bytes=200 << 20, free_entries=100)
OLD = replace(THERE, state="filled", left_over=True, used_bytes=90 << 20, entries=49, free_bytes=30 << 20)


def move(files: FilesKind, here: TreeFacts, there: TreeFacts, *, root: bool = False, rsync: str = "3.5.1") -> MoveFacts:
    tree = Tree(path=PATH, inside="/data", files=files, root=root)
    return MoveFacts(
        workload=COUNTER,
        destination="beta",
        interfaces={"alpha": "eth0", "beta": "eth0"},
        hosts={"alpha": healthy_facts(11), "beta": healthy_facts(12)},
        workloads={"alpha": replace(RUNNING, trees=(tree,))},
        files={
            "alpha": FilesFacts(rsync="3.5.1", trees=(here,)),
            "beta": FilesFacts(rsync=rsync, trees=(there,)),
        },
        differing={PATH: "a/b is missing there"} if files == "present" else {},
    )


@pytest.mark.parametrize(
    ("files", "here", "there", "options", "expected"),
    [
        ("sync", HERE, THERE, {}, ""),
        ("sync", HERE, replace(THERE, state="empty"), {}, ""),
        ("sync", HERE, OLD, {}, ""),
        ("sync", HERE, THERE, {"rsync": ""}, "RSYNC_MISSING: there is no rsync, to copy /srv/data with"),
        ("sync", HERE, replace(OLD, left_over=False), {}, "FILES_IN_THE_WAY: /srv/data exists"),
        ("sync", HERE, replace(OLD, left_over=False), {"root": True}, ""),
        (
            "sync",
            HERE,
            replace(THERE, free_bytes=109 << 20),
            {},
            "DISK_FULL: /srv/data needs 110 MiB more, 109 MiB are free",
        ),
        ("sync", HERE, replace(OLD, free_bytes=19 << 20), {}, "DISK_FULL: /srv/data needs 20 MiB more"),
        ("sync", HERE, replace(THERE, free_entries=49), {}, "DISK_FULL: /srv/data needs 50 inodes more, 49 are free"),
        ("sync", HERE, replace(THERE, problem="no directory"), {}, "FILES_UNUSABLE: no directory"),
        ("sync", replace(HERE, state="absent"), THERE, {}, "FILES_MISSING: /srv/data is not there"),
        ("shared", HERE, THERE, {}, "FILES_MISSING: /srv/data is not there"),
        ("shared", HERE, replace(OLD, probe_seen=True), {}, ""),
        ("shared", HERE, OLD, {}, "FILES_NOT_SHARED: a file that was made in /srv/data on the source"),
        ("present", HERE, replace(OLD, digest="1"), {}, ""),
        ("present", HERE, THERE, {}, "FILES_MISSING: /srv/data is not there"),
        ("present", HERE, OLD, {}, "FILES_DIFFER: /srv/data is not the source's: a/b is missing there"),
    ],
)
def test_findings(files: FilesKind, here: TreeFacts, there: TreeFacts, options: dict[str, Any], expected: str) -> None:
    found = list(file_findings(move(files, here, there, **options), "alpha"))
    assert [f"{each.code}: {each.message}"[: len(expected)] for each in found] == ([expected] if expected else [])
    assert all(each.where == "beta" for each in found)


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ((Tree(path=PATH, inside="/data", files="sync"),), []),
        ((Tree(path="/volumes/7f", inside="/data", files="sync"),), ["on alpha, and /volumes/7f there"]),
        ((), ["on alpha, and another directory there"]),
    ],
)
def test_what_is_copied_has_to_be_what_the_container_sees(there: tuple[Tree, ...], expected: list[str]) -> None:
    facts = move("sync", HERE, THERE)
    container = replace(RUNNING, state="absent", trees=there)
    found = list(file_findings(replace(facts, workloads={**facts.workloads, "beta": container}), "alpha"))
    assert [(each.code, each.where) for each in found] == [("FILES_ELSEWHERE", "beta")] * len(expected)
    assert [each.message.partition(f"/data of the container is {PATH} ")[2] for each in found] == expected
    other = replace(container, bundle_digest="other")  # another container altogether, which is told elsewhere
    assert not list(file_findings(replace(facts, workloads={**facts.workloads, "beta": other}), "alpha"))


def test_a_host_that_gave_no_answer_is_a_finding_elsewhere() -> None:
    facts = move("sync", HERE, THERE)
    assert list(file_findings(replace(facts, files={}), "alpha")) == []


def test_the_first_difference() -> None:
    here = {"b": "1", "c": "1"}
    assert first_difference(here, here) == ""
    assert first_difference(here, {"b": "1"}) == "c is missing there"
    assert first_difference(here, {**here, "a": "1"}) == "a is there alone"
    assert first_difference(here, {"b": "2"}).startswith("b is another there")
    assert first_difference({"\udcff": "1"}, {}) == "\ufffd is missing there"


async def test_probes_are_offered_before_they_are_looked_for_and_always_withdrawn(tmp_path: Path) -> None:
    hosts = FakeHosts({name: FakeHost(healthy_facts(11)) for name in ("alpha", "beta")})
    facts = FilesFacts(rsync="", trees=(HERE,))
    hosts.hosts["alpha"].replies |= {DescribeFiles: facts, WithdrawProbes: Done()}
    hosts.hosts["beta"].replies[DescribeFiles] = facts
    tree = Tree(path=PATH, inside="/data", files="shared")
    config = configuration(tmp_path)
    alpha, beta = config.host("alpha"), config.host("beta")
    async with hosts.connect(alpha, print) as source, hosts.connect(beta, print) as destination:
        ends = {"alpha": source, "beta": destination}
        assert await compare_files(ends, "counter", ()) == ({}, {})
        assert await compare_files(ends, "counter", (tree,)) == ({"alpha": facts, "beta": facts}, {})
        asked = [(host, type(request), getattr(request, "offer", None)) for host, request in hosts.calls]
        first, second, last = asked
        assert (first, second) == (("alpha", DescribeFiles, True), ("beta", DescribeFiles, False))
        assert last[:2] == ("alpha", WithdrawProbes)
        hosts.hosts["beta"].failing[DescribeFiles] = ProtocolError("no")
        with pytest.raises(ProtocolError):
            await compare_files(ends, "counter", (tree,))
        assert isinstance(hosts.calls[-1][1], WithdrawProbes)


async def test_trees_that_differ_are_listed(tmp_path: Path) -> None:
    def host(digest: str, entries: object) -> FakeHost:
        facts = FilesFacts(rsync="", trees=(replace(HERE, digest=digest),))
        listing = Listing(entries=gzip.compress(json.dumps(entries).encode()))
        return FakeHost(healthy_facts(11), replies={DescribeFiles: facts, ListTree: listing})

    hosts = FakeHosts({"alpha": host("1", {"a": "1"}), "beta": host("2", {"a": "2"})})
    config = configuration(tmp_path)
    async with (
        hosts.connect(config.host("alpha"), print) as source,
        hosts.connect(config.host("beta"), print) as destination,
    ):
        ends = {"alpha": source, "beta": destination}
        trees = (Tree(path=PATH, inside="/data", files="present"),)
        assert (await compare_files(ends, "counter", trees))[1][PATH].startswith("a is another there")
        hosts.hosts["beta"].replies[ListTree] = Listing(entries=b"x")
        with pytest.raises(ProtocolError, match="listing of /srv/data on beta is none"):
            await compare_files(ends, "counter", trees)
