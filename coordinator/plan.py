"""Pure: configuration + facts → ``MigrationPlan``. Clock, randomness and the frame builder are handed in.

The frames that announce an address are built here, where the plan is made, so that the hosts need no scapy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import IPv6Address, ip_interface

from coordinator.config import Host, Policy
from coordinator.facts import HostFacts, NamespaceFacts, WorkloadFacts, WorkloadSpec
from coordinator.protocol import AddressMove, Endpoint, MigrationPlan, Mode

#: ``netfix.announce.announcement_frames`` and ``probe_frames``: (address, mac) → the frames that say "this MAC has this
#: address", or that ask who has it.
FrameBuilder = Callable[[str, str], tuple[bytes, ...]]

ID_LIMIT = 48
_STAMP = "%Y%m%dT%H%M%S"
_NAME_LIMIT = 24
TOKEN_LIMIT = ID_LIMIT - len("20261120T061500--") - _NAME_LIMIT
_MIB = 1024 * 1024
_PER_SOCKET_BYTES = 8192


def migration_id(workload: str, now: datetime, token: str) -> str:
    """An id that sorts by time: ``20261120T061500-counter-3f9a``.

    ``now`` is aware of its zone; ``token`` (at most ``TOKEN_LIMIT`` characters) makes two ids of one second
    different. The id is at most 48 characters of letters, digits, ``_``, ``.`` and ``-``: the name of a directory and
    of a nftables table as it stands.
    """
    return f"{now.astimezone(UTC).strftime(_STAMP)}-{id_part(workload)}-{token}"


def id_part(workload: str) -> str:
    """What of a workload's name is in the ids of its migrations."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", workload)[:_NAME_LIMIT]


def image_space_bytes(memory_bytes: int, sockets: int) -> int:
    """Memory that the images of a workload of that size may take: page maps and sockets come on top of its pages.

    CRIU writes a file for each connection (tcp-stream-*.img), which takes a page of a tmpfs however small it is."""
    return memory_bytes + memory_bytes // 10 + sockets * _PER_SOCKET_BYTES + 64 * _MIB


def make_plan(
    *,
    migration: str,
    workload: WorkloadSpec,
    policy: Policy,
    source: Host,
    destination: Host,
    source_facts: HostFacts,
    destination_facts: HostFacts,
    workload_facts: WorkloadFacts,
    frames: FrameBuilder,
    probes: FrameBuilder,
) -> MigrationPlan:
    """The plan of a move whose checks have passed. ``workload_facts`` are the source's.

    Precondition: both hosts' interfaces exist, which preflight has checked; ``ValueError`` otherwise.
    """
    namespace = workload_facts.namespace
    source_mac, destination_mac = _mac(source_facts), _mac(destination_facts)
    if namespace is not None:  # its MAC moves with it
        source_mac = destination_mac = namespace.mac
    services = frozenset(workload.addresses)

    def move(text: str) -> AddressMove:
        service = ip_interface(text)
        address = str(service.ip)
        return AddressMove(
            address=address,
            prefixlen=service.network.prefixlen,
            announce_at_destination=frames(address, destination_mac),
            announce_at_source=frames(address, source_mac),
            probe_at_destination=probes(address, destination_mac),
            source_next_hop=next_hop(source_facts, text, services),
            destination_next_hop=next_hop(destination_facts, text, services),
        )

    return MigrationPlan(
        id=migration,
        workload=workload,
        source=_endpoint(source, source_mac),
        destination=_endpoint(destination, destination_mac),
        addresses=tuple(move(text) for text in workload.addresses),
        image_space_bytes=image_space_bytes(workload_facts.memory_bytes, len(workload_facts.sockets)),
        expected_pids=workload_facts.pids,
        deadlines=policy.deadlines,
        memory=replace(policy.memory, mode=memory_mode(policy, source_facts)),
        track_connections=destination_facts.tracks_connections,
        namespace=namespace,
        trees=tuple(tree for tree in workload_facts.trees if tree.files != "present"),
        namespace_parent=namespace_parent(namespace, source.interface, destination.interface) if namespace else "",
    )


def memory_mode(policy: Policy, source: HostFacts) -> Mode:
    """The mode of a move: ``auto`` is pre-copy where the source's kernel can tell which pages were written. The modes
    that send rounds need that as well, and become stop-copy without it (preflight says so)."""
    if policy.mode in ("auto", "pre-copy", "hybrid") and source.tracker == "none":
        return "stop-copy"
    return "pre-copy" if policy.mode == "auto" else policy.mode


def namespace_parent(namespace: NamespaceFacts, source_interface: str, destination_interface: str) -> str:
    """What a workload's own network namespace is attached to on the destination: the interface there that stands for
    the source's, or else a bridge or interface of the same name."""
    return destination_interface if namespace.parent == source_interface else namespace.parent


def next_hop(facts: HostFacts, service: str, services: Collection[str]) -> str:
    """The address by which a router reaches a host, for a service address in CIDR form: the first of its family on the
    host's interface that stays there. Empty if there is none; a link-local one is no use without an interface."""
    staying = {ip_interface(text).ip for text in services}
    for text in facts.interface.addresses if facts.interface else ():
        own = ip_interface(text).ip
        unusable = own in staying or (isinstance(own, IPv6Address) and own.is_link_local)
        if own.version == ip_interface(service).version and not unusable:
            return str(own)
    return ""


def _endpoint(host: Host, mac: str) -> Endpoint:
    return Endpoint(name=host.name, interface=host.interface, channel_address=host.channel_address, mac=mac)


def _mac(facts: HostFacts) -> str:
    if facts.interface is None:
        raise ValueError(f"{facts.hostname} lacks its interface: a plan was made of facts that no check has passed")
    return facts.interface.mac
