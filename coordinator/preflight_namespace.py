"""Pure: can a workload's own network namespace be made on the destination? Part of ``preflight``."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_interface

from coordinator.facts import HostFacts, MoverFacts, NamespaceFacts, WorkloadFacts, WorkloadSpec
from coordinator.findings import Finding, finding


def namespace_findings(
    *,
    workload: WorkloadSpec,
    namespace: NamespaceFacts,
    destination: str,
    parent: str,
    about: HostFacts | None,
    there: WorkloadFacts,
    mover: MoverFacts | None,
) -> Iterator[Finding]:
    """``parent``: what it would be attached to on the destination, of which ``about``, ``there`` and ``mover`` are the
    facts."""
    if there.namespace_taken:
        hint = f"Remove it if nothing uses it: ip netns delete {there.namespace_taken.rpartition('/')[2]}."
        yield finding("NAMESPACE_TAKEN", destination, f"{there.namespace_taken} is there already", hint)
    if about is not None and parent not in about.interfaces:
        message = f"{namespace.interface} of {workload.name} is attached to {parent}, which is not there"
        yield finding("NAMESPACE_PARENT_MISSING", destination, message)
    services = {ip_interface(text) for text in workload.addresses}
    for text in namespace.addresses:
        if ip_interface(text) not in services:
            message = f"{text} is in the network namespace {namespace.path}, and not among the addresses"
            yield finding("NAMESPACE_OTHER_ADDRESS", workload.name, message)
    if workload.mover.router is not None:
        yield from _behind_a_router(workload, namespace, destination, parent, mover)


def _behind_a_router(
    workload: WorkloadSpec, namespace: NamespaceFacts, destination: str, parent: str, mover: MoverFacts | None
) -> Iterator[Finding]:
    """The router's next hop is the host, which has to pass packets on. To a macvlan on it, it cannot: what the
    interface below sends goes out by the cable (drivers/net/macvlan.c); only a switch that vepa needs sends it back."""
    if namespace.kind == "macvlan" and namespace.mode != "vepa":
        message = f"{namespace.interface} of {workload.name} is a macvlan on {parent}, by which the router sends"
        yield finding("MACVLAN_BEHIND_ROUTER", destination, message)
    elif mover is not None:
        for text in workload.addresses:
            address = str(ip_interface(text).ip)
            if (onward := mover.onward.get(address, "")) != parent:
                where = f"passes it on to {onward}" if onward else "does not pass it on"
                message = f"what the router sends for {address} has to go on to {parent}: {destination} {where}"
                yield finding("NOT_PASSED_ON", destination, message, _passing_on(text, parent))


def _passing_on(service: str, parent: str) -> str:
    address = ip_interface(service).ip
    switch, host = ("ipv6.conf.all.forwarding", 128) if address.version == 6 else ("ipv4.ip_forward", 32)
    return f"There: sysctl net.{switch}=1 and ip route add {address}/{host} dev {parent}, so that it lasts."
