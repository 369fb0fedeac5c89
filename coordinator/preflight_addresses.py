"""Pure: preflight of the service addresses: where they are, who answers for them, how they move, what drops them."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address, ip_interface

from coordinator.facts import MoverFacts, MoverSpec, WorkloadFacts
from coordinator.findings import Finding, finding
from coordinator.move_facts import MoveFacts
from coordinator.plan import next_hop


def address_findings(facts: MoveFacts, source: str) -> Iterator[Finding]:
    """Whether the service addresses are where they should be, and could get to the destination."""
    here = facts.workloads[source]
    there = facts.workloads.get(facts.destination)
    l2 = facts.workload.mover.kind == "l2"  # the others need no common segment
    source_host, destination_host = facts.hosts.get(source), facts.hosts.get(facts.destination)
    for text in facts.workload.addresses:
        address = str(ip_interface(text).ip)
        yield from _on_source(facts, source, address, _interfaces(here, text))
        if there and (taken := _interfaces(there, text)):
            hint = f"Remove it there: ip address del {text} dev {taken[0]}."
            yield finding(
                "ADDRESS_ON_DESTINATION", facts.destination, f"{facts.destination} has {address} already", hint
            )
        if source_host and source_host.interface and address in facts.answers:
            yield from _answered(facts, address, source, (here.namespace or source_host.interface).mac)
        if l2 and destination_host and destination_host.interface and destination_host.interface.addresses:
            subnets = [ip_interface(each).network for each in destination_host.interface.addresses]
            if not any(ip_address(address) in subnet for subnet in subnets):
                message = f"{address} is in no subnet of {destination_host.interface.name}"
                yield finding("ADDRESS_OUTSIDE_SUBNET", facts.destination, message)
    yield from _mover(facts, source)
    yield from _firewall(facts)


def _answered(facts: MoveFacts, address: str, source: str, source_mac: str) -> Iterator[Finding]:
    macs = facts.answers[address]
    for mac in macs:
        if mac.lower() != source_mac.lower():
            message = f"{mac} answers for {address}, and {source}'s interface is {source_mac}"
            yield finding("ADDRESS_ANSWERED_BY_OTHER", facts.destination, message)
    if not macs and facts.workload.mover.kind == "l2":
        yield finding("ADDRESS_NOT_ANSWERED", facts.destination, f"nobody answers {facts.destination} for {address}")


def _interfaces(facts: WorkloadFacts, service: str) -> tuple[str, ...]:
    """The interfaces that have a service address; the facts may name it with or without its prefix length."""
    wanted = ip_interface(service).ip
    return next((names for text, names in facts.addresses.items() if ip_interface(text).ip == wanted), ())


def _on_source(facts: MoveFacts, source: str, address: str, interfaces: tuple[str, ...]) -> Iterator[Finding]:
    configured = facts.interfaces[source]
    if not interfaces:
        yield finding("ADDRESS_NOT_ON_SOURCE", source, f"{source} does not have {address}")
    elif len(interfaces) > 1:
        yield finding("ADDRESS_ON_SEVERAL", source, f"{address} is on {' and on '.join(interfaces)}")
    elif facts.workloads[source].namespace is None and interfaces[0] != configured:
        message = f"{address} is on {interfaces[0]}, not on {configured}"
        yield finding("ADDRESS_ON_OTHER_INTERFACE", source, message)


def mover_problem(host: str, mover: MoverSpec, facts: MoverFacts) -> Iterator[Finding]:
    """Why a host's end of a mover cannot work there."""
    if facts.problem:
        yield finding("HOOK_UNUSABLE" if mover.kind == "hook" else "ROUTER_UNREACHABLE", host, facts.problem)


def _mover(facts: MoveFacts, source: str) -> Iterator[Finding]:
    workload = facts.workload
    for host in (source, facts.destination):
        if host in facts.movers and (host == source or workload.mover.kind != "route"):
            yield from mover_problem(host, workload.mover, facts.movers[host])
    if workload.mover.router is None:
        return
    routes = facts.movers[source].routes if source in facts.movers else {}
    for text in workload.addresses:
        address = str(ip_interface(text).ip)
        hops = {
            host: next_hop(facts.hosts[host], text, workload.addresses)
            for host in (source, facts.destination)
            if host in facts.hosts
        }
        for host in (host for host, hop in hops.items() if not hop):
            yield finding("NEXT_HOP_MISSING", host, f"no router can reach {host} for {address}")
        if address in routes and routes[address] != hops.get(source):
            router, route = workload.mover.router.address, routes[address] or "no host route"
            message = f"the router {router} has {route} for {address}, not {source}'s {hops.get(source) or 'address'}"
            yield finding("ROUTE_NOT_TO_SOURCE", source, message)


def _firewall(facts: MoveFacts) -> Iterator[Finding]:
    for each in facts.firewall:
        service = each.service
        message = f"{each.chain} drops what comes to {service.protocol} {service.address} port {service.port}"
        yield finding("FIREWALL_DROPS", facts.destination, message)
