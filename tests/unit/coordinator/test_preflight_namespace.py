"""A workload's own network namespace: where it goes, and what is in its way there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from coordinator.facts import NamespaceFacts, WorkloadFacts
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
