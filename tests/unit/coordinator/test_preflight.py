"""Preflight: each fact that matters, and the exact codes it leads to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.checks import CHECKS
from coordinator.errors import HostUnreachable
from coordinator.facts import (
    CriuFacts,
    FirewallDrop,
    HostFacts,
    LeftoverFacts,
    MoverFacts,
    MoverSpec,
    Obstacle,
    RouterSpec,
    ServicePort,
    SocketFacts,
    WorkloadFacts,
    WorkloadSpec,
)
from coordinator.fakes import healthy_facts
from coordinator.findings import finding, in_order
from coordinator.move_facts import MoveFacts, service_ports
from coordinator.obstacles import NEEDS_CAP_SYS_RESOURCE
from coordinator.preflight import host_findings, is_unicast_mac, move_findings, numbers, release
from coordinator.protocol import SelfTestResult
from tests.unit.coordinator.samples import ABSENT, ADDRESS, ALPHA_MAC, BETA_MAC, CIDR, RUNNING, tcp

GOOD = SelfTestResult(ok=True)
BAD = SelfTestResult(ok=False, problem="Error (criu/sk-inet.c:101): Can't get 1:16 opt")
ALPHA, BETA = healthy_facts(11), healthy_facts(12)
CRIU_42 = CriuFacts(path="/usr/sbin/criu", version="4.2.1")
CRIU_41 = CriuFacts(path="/usr/sbin/criu", version="4.1.1")
COUNTER = WorkloadSpec(name="counter", runtime="runc", container="counter", bundle="/srv/counter", addresses=(CIDR,))
BY_HOOK = replace(COUNTER, mover=MoverSpec(kind="hook", hook="/usr/local/sbin/move-address"))
BY_ROUTE = replace(COUNTER, mover=MoverSpec(kind="route", router=RouterSpec(address="192.0.2.1")))
SERVICE_PORT = ServicePort(protocol="tcp", address=ADDRESS, port=7000)
PROCESS = WorkloadSpec(name="counter", runtime="process", pid_file="/run/counter.pid", addresses=(CIDR,))
GATE = LeftoverFacts(kind="gate", detail="gate of the migration 20261120T061500-counter-3f9a", hint="open it")
OTHER_GATE = replace(GATE, detail="gate of the migration 20261120T061500-echo-3f9a")
RULE = LeftoverFacts(kind="criu-rule", detail="2 rules: locks of single connections", hint="nft delete rule")
NAMED_RULE = replace(RULE, detail="drops 192.0.2.200:7000 from 192.0.2.100")
OTHER_RULE = replace(RULE, detail="drops 192.0.2.7:80 from 192.0.2.100")


def interface(facts: HostFacts, **changes: Any) -> HostFacts:
    assert facts.interface is not None
    return replace(facts, interface=replace(facts.interface, **changes))


@pytest.mark.parametrize(
    ("changes", "self_test", "codes"),
    [
        ({}, GOOD, []),
        ({}, None, []),
        ({"python": "3.10.12"}, GOOD, ["PYTHON_TOO_OLD"]),
        ({"euid": 1000}, GOOD, ["NOT_ROOT"]),
        ({"missing_capabilities": ("CAP_SYS_ADMIN", "CAP_NET_ADMIN")}, GOOD, ["CAPABILITY_MISSING"] * 2),
        ({"missing_capabilities": ("CAP_SYS_PTRACE", "CAP_CHECKPOINT_RESTORE")}, GOOD, ["CAPABILITY_MISSING"] * 2),
        ({"missing_capabilities": ("CAP_SYS_RESOURCE",)}, GOOD, ["SYS_RESOURCE_MISSING"]),
        ({"missing_capabilities": ("CAP_SYS_RESOURCE",)}, None, ["SYS_RESOURCE_MISSING"]),
        ({"missing_capabilities": ("CAP_SYS_RESOURCE",)}, replace(GOOD, any_uid=True), []),
        ({"criu": None}, None, ["CRIU_MISSING"]),
        ({"criu": None}, BAD, ["CRIU_MISSING"]),
        ({"criu": replace(CRIU_42, problem="Failed to fill self vdso symtable")}, None, ["CRIU_BROKEN"]),
        ({"criu": replace(CRIU_42, problem="no soft-dirty")}, GOOD, ["CRIU_COMPLAINS"]),
        ({"criu": replace(CRIU_42, missing=("userns",))}, GOOD, ["CRIU_FEATURE_MISSING"]),
        ({"tracker": "none"}, GOOD, ["WRITES_NOT_TRACKED"]),
        ({"criu": CRIU_41}, None, ["CRIU_OLD_FOR_KERNEL"]),
        ({"criu": CRIU_41}, GOOD, []),
        ({"criu": CRIU_41}, BAD, ["SELF_TEST_FAILED", "CRIU_OLD_FOR_KERNEL"]),
        ({"criu": CRIU_41, "kernel": "6.15.9-amd64"}, None, []),
        ({"criu": CRIU_41, "kernel": "7.0.1"}, None, ["CRIU_OLD_FOR_KERNEL"]),
        ({"criu": replace(CRIU_41, version="unknown")}, None, []),
        ({}, BAD, ["SELF_TEST_FAILED"]),
        ({"runtimes": {}}, GOOD, ["RUNTIME_MISSING"]),
        ({"cgroup": "none"}, GOOD, ["CGROUP_MISSING"]),
        ({"nf_tables": False}, GOOD, ["NF_TABLES_MISSING"]),
        ({"interface": None}, GOOD, ["INTERFACE_MISSING"]),
        ({"leftovers": (RULE,)}, GOOD, ["LEFTOVER"]),
        ({"unfinished": ("20261120T061500-counter-3f9a",)}, GOOD, ["UNFINISHED"]),
        ({"euid": 1, "leftovers": (RULE,), "nf_tables": False}, GOOD, ["NOT_ROOT", "NF_TABLES_MISSING", "LEFTOVER"]),
    ],
)
def test_host_findings(changes: dict[str, Any], self_test: SelfTestResult | None, codes: list[str]) -> None:
    found = host_findings("alpha", "eth0", replace(ALPHA, **changes), self_test, ["runc", "process"])
    assert [each.code for each in found] == codes
    assert all(each.where == "alpha" and each.message and each.hint for each in found)


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({"up": False}, ["INTERFACE_DOWN"]),
        ({"addresses": ()}, ["INTERFACE_WITHOUT_ADDRESS"]),
        ({"mac": "00:00:00:00:00:00"}, ["INTERFACE_WITHOUT_MAC"]),
        ({"mac": ""}, ["INTERFACE_WITHOUT_MAC"]),
    ],
)
def test_interface_findings(changes: dict[str, Any], codes: list[str]) -> None:
    found = host_findings("alpha", "eth0", interface(ALPHA, **changes), GOOD, [])
    assert [each.code for each in found] == codes


def test_a_runtime_that_no_workload_uses_need_not_be_there() -> None:
    assert host_findings("alpha", "eth0", replace(ALPHA, runtimes={}, cgroup="none"), GOOD, ["process"]) == ()


def move(**changes: Any) -> MoveFacts:
    """`counter` runs on alpha and is to go to beta, and nothing is wrong, but for the changes."""
    whole: dict[str, Any] = {
        "workload": COUNTER,
        "destination": "beta",
        "interfaces": {"alpha": "eth0", "beta": "eth0", "gamma": "eth0"},
        "hosts": {"alpha": ALPHA, "beta": BETA},
        "workloads": {"alpha": RUNNING, "beta": ABSENT, "gamma": ABSENT},
        "self_tests": {"alpha": GOOD, "beta": GOOD},
        "answers": {ADDRESS: (ALPHA_MAC,)},
    }
    return MoveFacts(**{**whole, **changes})


def with_hosts(alpha: HostFacts = ALPHA, beta: HostFacts = BETA) -> dict[str, Any]:
    return {"hosts": {"alpha": alpha, "beta": beta}}


def with_workloads(alpha: WorkloadFacts = RUNNING, beta: WorkloadFacts = ABSENT) -> dict[str, Any]:
    return {"workloads": {"alpha": alpha, "beta": beta, "gamma": ABSENT}}


def with_sockets(*sockets: Any) -> dict[str, Any]:
    return with_workloads(replace(RUNNING, sockets=sockets))


OTHER_UID = replace(RUNNING, obstacles=(Obstacle(code=NEEDS_CAP_SYS_RESOURCE, message="m", hint="h"),))
ANY_UID = replace(GOOD, any_uid=True)
TOO_BIG = replace(RUNNING, memory_bytes=4 << 30)
SMALL_HOST_BYTES = (64 << 20) + (64 << 20)


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({}, []),
        # both hosts by themselves
        (with_hosts(beta=replace(BETA, criu=None)), ["CRIU_MISSING"]),
        ({"self_tests": {"alpha": GOOD, "beta": BAD}}, ["SELF_TEST_FAILED"]),
        ({"self_tests": {"alpha": BAD}}, ["SELF_TEST_FAILED"]),
        (with_hosts(beta=replace(BETA, unfinished=("x",))), ["UNFINISHED"]),
        (with_hosts(beta=replace(BETA, interface=None)), ["INTERFACE_MISSING"]),
        # where it runs
        (with_workloads(ABSENT), ["WORKLOAD_NOT_RUNNING"]),
        (with_workloads(WorkloadFacts(state="stopped")), ["WORKLOAD_NOT_RUNNING"]),
        ({"destination": "alpha"}, ["SAME_HOST"]),
        (with_workloads(beta=RUNNING), ["RUNS_ON_SEVERAL"]),
        (with_workloads(OTHER_UID), [NEEDS_CAP_SYS_RESOURCE]),
        (with_workloads(OTHER_UID) | {"self_tests": {"beta": ANY_UID}}, [NEEDS_CAP_SYS_RESOURCE]),
        (with_workloads(OTHER_UID) | {"self_tests": {"alpha": ANY_UID}}, []),
        (with_workloads(replace(RUNNING, moving="20261120T0615-x")), ["WORKLOAD_BUSY"]),
        (with_workloads(beta=replace(ABSENT, moving="20261120T0615-x")), ["WORKLOAD_BUSY"]),
        ({"unreachable": {"delta": HostUnreachable("delta: no route")}}, ["HOST_NOT_ASKED"]),
        (
            {
                "hosts": {"alpha": ALPHA},
                "workloads": {"alpha": RUNNING},
                "unreachable": {"beta": HostUnreachable("no")},
            },
            ["HOST_UNREACHABLE"],
        ),
        (
            {"hosts": {}, "workloads": {}, "unreachable": {"beta": HostUnreachable("no")}},
            ["HOST_UNREACHABLE", "WORKLOAD_NOT_RUNNING"],
        ),
        # the pair
        (with_hosts(beta=replace(BETA, identity=ALPHA.identity)), ["SAME_HOST"]),
        (with_hosts(beta=replace(BETA, machine="aarch64")), ["ARCHITECTURE_DIFFERS"]),
        (with_hosts(beta=replace(BETA, kernel="6.9.1")), []),
        (with_hosts(beta=replace(BETA, kernel="6.8.1")), ["KERNEL_MUCH_OLDER"]),
        (with_hosts(alpha=replace(ALPHA, kernel="6.8.1")), []),
        (with_hosts(beta=replace(BETA, criu=replace(CRIU_42, version="4.3"))), ["CRIU_VERSIONS_DIFFER"]),
        (with_hosts(beta=replace(BETA, cgroup="hybrid")), ["CGROUP_DIFFERS"]),
        (with_hosts(beta=replace(BETA, cgroup="none")), ["CGROUP_MISSING"]),
        ({"workload": PROCESS, **with_hosts(beta=replace(BETA, cgroup="hybrid", runtimes={}))}, []),
        ({"workload": replace(COUNTER, runtime="crun")}, ["RUNTIME_MISSING"] * 2),
        (with_workloads(beta=replace(ABSENT, runtime_problem="it has processes")), ["RUNTIME_LOST_IT"]),
        (with_hosts(beta=interface(BETA, mtu=9000)), ["MTU_DIFFERS"]),
        (with_workloads(TOO_BIG), ["NOT_ENOUGH_SPACE"] * 2),
        (with_hosts(beta=replace(BETA, memory_available_bytes=SMALL_HOST_BYTES)), ["NOT_ENOUGH_SPACE"]),
        # the destination
        (with_workloads(beta=WorkloadFacts(state="stopped")), ["ALREADY_PRESENT"]),
        (with_workloads(beta=replace(ABSENT, bundle_present=False)), ["BUNDLE_MISSING"]),
        (with_workloads(beta=replace(ABSENT, bundle_problem="config.json differs")), ["BUNDLE_DIFFERS"]),
        ({"workload": PROCESS, **with_hosts(beta=replace(BETA, taken_pids=(1, 2101)))}, ["PID_TAKEN"]),
        (with_hosts(beta=replace(BETA, taken_pids=(1, 2101))), []),
        # the workload
        (with_sockets(), ["NO_SERVICE_SOCKET"]),
        (with_sockets(tcp("0.0.0.0")), []),
        (with_sockets(tcp("::")), []),
        (with_sockets(tcp("::ffff:192.0.2.200")), []),
        (with_sockets(tcp(), tcp("192.0.2.11", 50000, "192.0.2.9", 5432)), ["SOCKET_ON_OTHER_ADDRESS"]),
        (with_sockets(tcp(), tcp("127.0.0.1", 50000, "127.0.0.1", 5432)), ["LOOPBACK_PEER_STAYS"]),
        (with_sockets(tcp(), tcp("127.0.0.1", 50, "127.0.0.1", 60), tcp("127.0.0.1", 60, "127.0.0.1", 50)), []),
        (with_sockets(tcp(), tcp("127.0.0.1", 9000)), []),
        (
            with_workloads(replace(RUNNING, obstacles=(Obstacle(code="IO_URING", message="m", hint="h"),))),
            ["IO_URING"],
        ),
        # the addresses
        (with_workloads(replace(RUNNING, addresses={})), ["ADDRESS_NOT_ON_SOURCE"]),
        (with_workloads(replace(RUNNING, addresses={ADDRESS: ("eth0",)})), []),
        (with_workloads(replace(RUNNING, addresses={CIDR: ("eth1",)})), ["ADDRESS_ON_OTHER_INTERFACE"]),
        (with_workloads(beta=replace(ABSENT, addresses={CIDR: ("eth0",)})), ["ADDRESS_ON_DESTINATION"]),
        (with_workloads(replace(RUNNING, addresses={CIDR: ("eth0", "eth1")})), ["ADDRESS_ON_SEVERAL"]),
        ({"answers": {ADDRESS: (ALPHA_MAC.upper(),)}}, []),
        ({"answers": {ADDRESS: (ALPHA_MAC, BETA_MAC)}}, ["ADDRESS_ANSWERED_BY_OTHER"]),
        ({"answers": {ADDRESS: ()}}, ["ADDRESS_NOT_ANSWERED"]),
        ({"answers": {}}, []),
        (with_hosts(beta=interface(BETA, addresses=("198.51.100.1/24",))), ["ADDRESS_OUTSIDE_SUBNET"]),
        # the other movers
        ({"workload": BY_HOOK, "movers": {"alpha": MoverFacts(), "beta": MoverFacts()}}, []),
        ({"workload": BY_HOOK, "movers": {"beta": MoverFacts(problem="/x is missing")}}, ["HOOK_UNUSABLE"]),
        ({"workload": BY_HOOK, "answers": {ADDRESS: ()}}, []),
        ({"workload": BY_HOOK, **with_hosts(beta=interface(BETA, addresses=("198.51.100.1/24",)))}, []),
        ({"workload": BY_ROUTE, "movers": {"alpha": MoverFacts(routes={ADDRESS: "192.0.2.11"})}}, []),
        ({"workload": BY_ROUTE, "movers": {"alpha": MoverFacts(routes={ADDRESS: ""})}}, ["ROUTE_NOT_TO_SOURCE"]),
        (
            {"workload": BY_ROUTE, "movers": {"alpha": MoverFacts(routes={ADDRESS: "192.0.2.12"})}},
            ["ROUTE_NOT_TO_SOURCE"],
        ),
        ({"workload": BY_ROUTE, "movers": {"alpha": MoverFacts(problem="no route to host")}}, ["ROUTER_UNREACHABLE"]),
        (
            {"workload": BY_ROUTE, **with_hosts(beta=interface(BETA, addresses=("2001:db8::12/64", "192.0.2.200/24")))},
            ["NEXT_HOP_MISSING"],
        ),
        # the firewall
        ({"firewall": (FirewallDrop(service=SERVICE_PORT, chain="inet filter input"),)}, ["FIREWALL_DROPS"]),
        # leftovers
        (with_hosts(beta=replace(BETA, leftovers=(RULE,))), ["LEFTOVER_CUTS_SERVICE"]),
        (with_hosts(beta=replace(BETA, leftovers=(NAMED_RULE, OTHER_RULE))), ["LEFTOVER_CUTS_SERVICE", "LEFTOVER"]),
        (with_hosts(alpha=replace(ALPHA, leftovers=(GATE, OTHER_GATE))), ["LEFTOVER_CUTS_SERVICE", "LEFTOVER"]),
    ],
)
def test_move_findings(changes: dict[str, Any], codes: list[str]) -> None:
    found = move_findings(move(**changes))
    assert [each.code for each in found] == codes
    assert all(each.where and each.message and each.hint for each in found)


@pytest.mark.parametrize(
    ("socket", "addresses"),
    [
        (tcp(), [ADDRESS]),
        (tcp("0.0.0.0"), [ADDRESS]),
        (tcp("::"), [ADDRESS, "2001:db8::200"]),
        (tcp("2001:db8::200"), ["2001:db8::200"]),
        (tcp("192.0.2.7"), []),
        (tcp(remote="192.0.2.100", remote_port=40001), []),
        (replace(tcp(), protocol="udp", state="UNCONNECTED"), [ADDRESS]),
        (replace(tcp(remote="192.0.2.100", remote_port=5), protocol="udp"), []),
        (replace(tcp(), protocol="sctp"), []),
    ],
)
def test_where_clients_reach_a_workload(socket: SocketFacts, addresses: list[str]) -> None:
    both = replace(COUNTER, addresses=(CIDR, "2001:db8::200/64"))
    found = service_ports(both, replace(RUNNING, sockets=(socket, socket)))
    assert [each.address for each in found] == addresses
    assert all(each.port == 7000 and each.protocol == socket.protocol for each in found)


def test_an_obstacle_that_only_loses_something_is_a_warning() -> None:
    obstacle = Obstacle(code="X", message="m", hint="h", fatal=False)
    (found,) = move_findings(move(**with_workloads(replace(RUNNING, obstacles=(obstacle,)))))
    assert found.severity == "warning"


def test_a_workload_that_was_not_found_names_who_was_not_asked() -> None:
    facts = move(**with_workloads(ABSENT), unreachable={"delta": HostUnreachable("no route")})
    missing = next(each for each in move_findings(facts) if each.code == "WORKLOAD_NOT_RUNNING")
    assert "could not be asked: delta" in missing.message


def test_findings_are_ordered_by_severity_and_otherwise_as_found() -> None:
    found = [finding(code, "a", "m") for code in ("MTU_DIFFERS", "NOT_ROOT", "LEFTOVER", "CRIU_MISSING")]
    assert [each.code for each in in_order(found)] == ["NOT_ROOT", "CRIU_MISSING", "MTU_DIFFERS", "LEFTOVER"]


def test_every_registered_code_has_a_case_here() -> None:
    files = (
        Path(__file__),
        *(Path(__file__).with_name(f"test_preflight_{each}.py") for each in ("namespace", "files")),
    )
    text = "".join(path.read_text() for path in files)
    assert [code for code in CHECKS if f'"{code}' not in text] == []


@pytest.mark.parametrize(
    ("version", "expected"), [("6.18.0-rc2", (6, 18, 0)), ("4.2", (4, 2)), ("v4.1.1", (4, 1, 1)), ("", ()), ("x", ())]
)
def test_numbers(version: str, expected: tuple[int, ...]) -> None:
    assert numbers(version) == expected


def test_releases_grow_by_one_also_over_a_new_major_number() -> None:
    assert release("7.0.1") - release("6.19") == 1
    assert release("") == 0


def test_macs() -> None:
    assert is_unicast_mac(ALPHA_MAC)
    assert not any(is_unicast_mac(mac) for mac in ("", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00", "01:00:5e:00:00:01"))
