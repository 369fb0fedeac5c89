"""Which network namespace a workload has, and how it is told."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import get_type_hints

import pytest

from coordinator.agent.namespaced import NamespacedNetwork, attachment_of
from coordinator.agent.network import NetfixNetwork
from coordinator.agent.own_namespace import OwnNamespace, facts_of, own_namespace
from coordinator.agent.runtimes.oci import bundle_definition
from coordinator.agent.runtimes.podman import network_of
from coordinator.errors import NetworkChangeFailed
from coordinator.facts import NamespaceFacts, RouteFacts, WorkloadSpec
from coordinator.wire import decode, encode
from netfix.attachment import Attachment, Route
from netfix.gate import CLOSED, OPEN
from netfix.movers.base import AddressMover
from netfix.movers.fake import FakeMover, FakeWay

ATTACHED = Attachment(
    interface="eth0",
    kind="veth",
    parent="br0",
    host_end="v0",
    mode="",
    mac="02:00:5e:00:54:01",
    mtu=1500,
    addresses=("192.0.2.200/24",),
    routes=(Route("0.0.0.0/0", "192.0.2.1", "", 0, 0, 3),),
    sysctls={"net/ipv4/conf/eth0/arp_ignore": "1"},
)


def workload(bundle: Path) -> WorkloadSpec:
    return WorkloadSpec(name="c", runtime="runc", addresses=(), container="c", bundle=str(bundle))


@pytest.mark.parametrize(
    ("namespaces", "path"),
    [
        ([{"type": "pid"}, {"type": "network", "path": "/run/netns/c"}], Path("/run/netns/c")),
        ([{"type": "network"}], None),
        ([{"type": "pid"}], None),
        ("nonsense", None),
    ],
)
def test_the_path_is_the_configuration_s(tmp_path: Path, namespaces: object, path: Path | None) -> None:
    config = {"root": {"path": "rootfs"}, "linux": {"namespaces": namespaces}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert bundle_definition(tmp_path).network == path


@pytest.mark.parametrize(
    ("mode", "path"), [("ns:/run/netns/c", Path("/run/netns/c")), ("host", None), ("bridge", None), ("", None)]
)
def test_of_podman_it_is_an_option_s(mode: str, path: Path | None) -> None:
    assert network_of({"HostConfig": {"NetworkMode": mode}}) == path


def test_a_workload_in_the_host_s_namespace_has_none_of_its_own(tmp_path: Path) -> None:
    assert own_namespace(workload(tmp_path), None, os.getpid()) == OwnNamespace()
    with OwnNamespace().entered():
        pass


def test_facts_are_the_attachment_there_and_back() -> None:
    facts = facts_of(Path("/run/netns/c"), ATTACHED)
    assert attachment_of(decode(NamespaceFacts, encode(facts))) == ATTACHED


def test_facts_tell_all_that_netfix_tells_of_an_attachment_and_nothing_else() -> None:
    """netfix knows nothing of messages, so that there are two of each; the other host makes what they agree on."""
    route, attachment = get_type_hints(Route), get_type_hints(Attachment)
    assert get_type_hints(RouteFacts) == route
    assert get_type_hints(NamespaceFacts) == attachment | {"path": str, "routes": tuple[RouteFacts, ...]}


def network(path: Path, mover: AddressMover | None = None) -> NamespacedNetwork:
    def never() -> NetfixNetwork:
        raise AssertionError("nothing can be made in a namespace that is not there")

    return NamespacedNetwork(facts_of(path, ATTACHED), "br0", never, mover)


async def test_where_the_namespace_is_gone_nothing_is_left_to_undo(tmp_path: Path) -> None:
    gone = network(tmp_path / "gone")
    await gone.set_gate(CLOSED)
    await gone.drop_arrivals()
    await gone.forget_connections()
    await gone.remove_addresses()
    await gone.remove_gate()
    await gone.back()
    assert await gone.released(()) == ()
    await gone.finished()
    await gone.remove_namespace()
    await gone.close()


async def test_a_mover_that_works_on_the_host_goes_on_without_the_namespace(tmp_path: Path) -> None:
    way = FakeWay()
    gone = network(tmp_path / "gone", FakeMover("destination", way))
    await gone.divert()
    assert way.attracting == {"source", "destination"}
    await gone.back()
    assert way.attracting == {"source"}


async def test_and_nothing_can_be_opened(tmp_path: Path) -> None:
    with pytest.raises(NetworkChangeFailed, match="there is no network namespace"):
        await network(tmp_path / "gone").set_gate(OPEN)


async def test_what_is_at_the_path_stays(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.touch()
    with pytest.raises(NetworkChangeFailed, match="already"):
        await network(there).check_namespace()
    assert there.exists()
