"""A workload's own network namespace: where it goes, and what is in its way there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.facts import MoverFacts, MoverSpec, NamespaceFacts, RouterSpec, WorkloadFacts
from coordinator.fakes import healthy_facts
from coordinator.move_facts import MoveFacts, service_ports
from coordinator.plan import namespace_parent
from coordinator.preflight import move_findings
from coordinator.protocol import MigrationPlan
from coordinator.wire import decode, encode
from tests.unit.coordinator.samples import ADDRESS, CIDR, RUNNING, configuration
from tests.unit.coordinator.test_plan import frames, plan

MAC = "02:00:5e:00:54:c8"
OWN = NamespaceFacts(
    path="/run/netns/counter",
    interface="eth0",
    kind="veth",
    parent="br0",
    host_end="vcounter",
    mode="",
    mac=MAC,
    mtu=1500,
    addresses=(CIDR,),
    routes=(),
    sysctls={"net/ipv4/conf/eth0/arp_ignore": "1"},
)


def facts(folder: Path, own: NamespaceFacts = OWN, *, taken: str = "", bridge: bool = True) -> MoveFacts:
    alpha, beta = healthy_facts(11), healthy_facts(12)
    return MoveFacts(
        workload=configuration(folder).workload("counter"),
        destination="beta",
        interfaces={"alpha": "eth0", "beta": "eth0"},
        hosts={"alpha": alpha, "beta": replace(beta, interfaces=(*beta.interfaces, *(["br0"] if bridge else [])))},
        workloads={
            "alpha": replace(RUNNING, namespace=own, addresses={CIDR: ("inner",)}),
            "beta": WorkloadFacts(state="absent", namespace_taken=taken),
        },
        answers={ADDRESS: (MAC,)},
    )


def codes(found: MoveFacts) -> set[str]:
    return {each.code for each in move_findings(found)}


def test_nothing_is_in_the_way(tmp_path: Path) -> None:
    assert codes(facts(tmp_path)) == set()


def test_what_the_destination_lacks_is_told(tmp_path: Path) -> None:
    found = facts(tmp_path, taken="/run/netns/counter", bridge=False)
    assert codes(found) == {"NAMESPACE_TAKEN", "NAMESPACE_PARENT_MISSING"}


def test_every_address_inside_has_to_be_configured(tmp_path: Path) -> None:
    own = replace(OWN, addresses=(CIDR, "192.0.2.251/24"))
    assert codes(facts(tmp_path, own)) == {"NAMESPACE_OTHER_ADDRESS"}


def test_another_that_answers_is_known_by_the_workload_s_mac(tmp_path: Path) -> None:
    own = replace(OWN, mac="02:00:5e:00:54:01")
    assert codes(facts(tmp_path, own)) == {"ADDRESS_ANSWERED_BY_OTHER"}


def test_the_parent_is_the_interface_that_stands_for_the_source_s() -> None:
    assert namespace_parent(OWN, "eth0", "ens3") == "br0"
    assert namespace_parent(replace(OWN, kind="macvlan", parent="eth0"), "eth0", "ens3") == "ens3"


def test_a_host_s_firewall_is_not_asked_for_what_it_does_not_see(tmp_path: Path) -> None:
    workload = configuration(tmp_path).workload("counter")
    assert service_ports(workload, RUNNING)
    assert service_ports(workload, replace(RUNNING, namespace=OWN)) == ()


def test_both_ends_announce_the_workload_s_mac(tmp_path: Path) -> None:
    made = plan(tmp_path, workload_facts=replace(RUNNING, namespace=OWN))
    (move,) = made.addresses
    assert move.announce_at_destination == move.announce_at_source == frames(ADDRESS, MAC)
    assert (made.namespace, made.namespace_parent) == (OWN, "br0")
    assert decode(MigrationPlan, encode(made)) == made


ROUTER = MoverSpec(kind="route", router=RouterSpec(address="192.0.2.1", user="root", port=22))


@pytest.mark.parametrize(
    ("own", "onward", "wanted"),
    [
        (OWN, {ADDRESS: "br0"}, []),
        (OWN, {ADDRESS: "eth0"}, ["has to go on to br0: beta passes it on to eth0"]),
        (OWN, {ADDRESS: ""}, ["has to go on to br0: beta does not pass it on"]),
        (replace(OWN, kind="macvlan", parent="eth0", mode="bridge"), {ADDRESS: "eth0"}, ["is a macvlan on eth0"]),
        (replace(OWN, kind="macvlan", parent="eth0", mode="vepa"), {ADDRESS: "eth0"}, []),
    ],
)
def test_behind_a_router_the_destination_passes_packets_on(
    tmp_path: Path, own: NamespaceFacts, onward: dict[str, str], wanted: list[str]
) -> None:
    found = facts(tmp_path, own)
    workload = replace(found.workload, mover=ROUTER)
    movers = {"alpha": MoverFacts(routes={ADDRESS: "192.0.2.11"}), "beta": MoverFacts(problem="no key", onward=onward)}
    told = move_findings(replace(found, workload=workload, movers=movers))
    assert len(told) == len(wanted)
    for each, words in zip(told, wanted, strict=True):
        assert each.code in ("NOT_PASSED_ON", "MACVLAN_BEHIND_ROUTER")
        assert words in each.message


def test_how_a_destination_passes_packets_on_is_told(tmp_path: Path) -> None:
    found = facts(tmp_path)
    workload = replace(found.workload, mover=ROUTER)
    movers = {"alpha": MoverFacts(routes={ADDRESS: "192.0.2.11"}), "beta": MoverFacts()}
    (told,) = move_findings(replace(found, workload=workload, movers=movers))
    assert told.hint == f"There: sysctl net.ipv4.ip_forward=1 and ip route add {ADDRESS}/32 dev br0, so that it lasts."
