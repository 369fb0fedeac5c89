"""What is known before a move: the facts of all hosts together, as preflight judges them. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import ip_address, ip_interface
from typing import Literal

from coordinator.errors import LivemoveError
from coordinator.facts import FilesFacts, FirewallDrop, HostFacts, MoverFacts, ServicePort, WorkloadFacts, WorkloadSpec
from coordinator.protocol import SelfTestResult


@dataclass(frozen=True, kw_only=True)
class MoveFacts:
    """All that is known before a move. Hosts are named as in the configuration.

    ``interfaces``: the configured interface of each host. ``hosts`` and ``self_tests``: of source and destination.
    ``workloads``: of each host that answered; ``unreachable``: why the others did not. ``answers``: for each service
    address (without prefix length) the MACs that answered the destination; an absent address was not asked for.
    ``movers``: each end of a mover that is not l2. ``firewall``: the service's ports that the destination drops.
    ``files``: the workload's trees on source and destination, in the order of the source's ``WorkloadFacts.trees``;
    ``differing``: for a tree whose digests differ, by its path, the first entry that does, and how.
    """

    workload: WorkloadSpec
    destination: str
    interfaces: Mapping[str, str]
    hosts: Mapping[str, HostFacts]
    workloads: Mapping[str, WorkloadFacts]
    unreachable: Mapping[str, LivemoveError] = field(default_factory=dict)
    self_tests: Mapping[str, SelfTestResult] = field(default_factory=dict)
    answers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    movers: Mapping[str, MoverFacts] = field(default_factory=dict)
    firewall: tuple[FirewallDrop, ...] = ()
    files: Mapping[str, FilesFacts] = field(default_factory=dict)
    differing: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def source(self) -> str | None:
        """The one host that runs the workload; ``None`` if there is none, or more than one."""
        running = running_on(self.workloads)
        return running[0] if len(running) == 1 else None


def running_on(facts: Mapping[str, WorkloadFacts]) -> tuple[str, ...]:
    """The hosts that run the workload."""
    return tuple(host for host, each in facts.items() if each.state == "running")


def service_ports(workload: WorkloadSpec, facts: WorkloadFacts) -> tuple[ServicePort, ...]:
    """Where clients reach a workload through a host's own firewall: its listeners and unconnected UDP sockets, on its
    service addresses or on any. None for one with a network namespace of its own, whose packets are not the host's."""
    found: dict[ServicePort, None] = {}
    for each in facts.sockets if facts.namespace is None else ():
        if (
            each.protocol not in ("tcp", "udp")
            or (each.protocol == "tcp" and each.state != "LISTEN")
            or each.remote_port
        ):
            continue
        local = ip_address(each.local.partition("%")[0])
        for text in workload.addresses:
            service = ip_interface(text).ip
            any_of_family = local.is_unspecified and (local.version == 6 or service.version == 4)
            if any_of_family or local == service:
                protocol: Literal["tcp", "udp"] = "tcp" if each.protocol == "tcp" else "udp"
                found[ServicePort(protocol=protocol, address=str(service), port=each.local_port)] = None
    return tuple(found)
