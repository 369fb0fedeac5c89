"""Whether this host's firewall would drop what comes for a service, as far as nftables tells.

Looked at are the chains of type filter that a packet for the host itself passes (hooks prerouting and input). The
packet is the first of a new client, of whom nothing is known: so only a drop that hits *every* client is found, and a
rule that may let some in is given the benefit of the doubt. Rules of iptables-legacy are in no table of nftables.
"""

import ipaddress
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import nft
from .errors import from_errno
from .firewall_match import CT_NEW, KnownPacket, Match, evaluate
from .netlink import NETLINK_NETFILTER, NetlinkSocket, Refusal
from .nft_sets import BaseChain, FirewallSet, base_chains, table_sets

_META_PROTOCOL, _META_IIF, _META_IIFNAME, _META_NFPROTO, _META_L4PROTO = 1, 4, 6, 15, 16
_CT_STATE = 0
_INTERFACE_NAME_BYTES = 16
_DEPTH = 16
"""The kernel lets chains jump so deep (NFT_JUMP_STACK_SIZE)."""


@dataclass(frozen=True, slots=True)
class Service:
    """What clients connect to: `protocol` is `tcp` or `udp`."""

    protocol: str
    address: str
    port: int


@dataclass(frozen=True)
class Ruleset:
    """What nftables has: the chains at hooks, the rules by family, table and chain, the sets by family and table."""

    chains: Sequence[BaseChain]
    rules: Mapping[tuple[int, str, str], Sequence[bytes]]
    sets: Mapping[tuple[int, str], Mapping[str, FirewallSet]]


def drops(ruleset: Ruleset, service: Service, interface: str, index: int) -> str:
    """The chain that drops every new client's first packet, as `FAMILY TABLE CHAIN`; empty if none does. Pure.

    `interface` is where packets come in, `index` its number.
    """
    packet = first_packet(service, interface, index)
    family = nft.IPV6 if ":" in service.address else nft.IPV4
    for chain in ruleset.chains:
        if chain.family not in (family, nft.INET):
            continue
        ends = _ends(ruleset, (chain.family, chain.table, chain.name), packet, 0)
        if "fall" in ends:
            ends = ends - {"fall"} | {"accept" if chain.accepts else "drop"}
        if ends == {"drop"}:
            return f"{nft.FAMILY_NAMES[chain.family]} {chain.table} {chain.name}"
    return ""


def _ends(ruleset: Ruleset, chain: tuple[int, str, str], packet: KnownPacket, depth: int) -> set[str]:
    """How the packet may leave a chain: accepted, dropped, or by falling off its end."""
    ends: set[str] = set()
    if depth > _DEPTH:
        return {"accept", "drop", "fall"}
    for expressions in ruleset.rules.get(chain, ()):
        match, verdict = evaluate(expressions, packet, ruleset.sets.get(chain[:2], {}))
        if match is Match.NO or verdict is None:
            continue
        goes_on = match is not Match.YES
        if verdict.kind in ("jump", "goto"):
            below = _ends(ruleset, (*chain[:2], verdict.chain), packet, depth + 1)
            ends |= below if verdict.kind == "goto" else below - {"fall"}
            goes_on = goes_on or (verdict.kind == "jump" and "fall" in below)
        else:
            ends.add("fall" if verdict.kind == "return" else verdict.kind)
        if not goes_on:
            return ends
    return ends | {"fall"}


def first_packet(service: Service, interface: str, index: int) -> KnownPacket:
    """What is known of the packet with which a client begins: not where it comes from. Pure."""
    address = ipaddress.ip_address(service.address)
    protocol = socket.IPPROTO_TCP if service.protocol == "tcp" else socket.IPPROTO_UDP
    network: list[int | None]
    if address.version == 4:
        network = [0x45, *([None] * 8), protocol, *([None] * 6), *address.packed]
    else:
        network = [*([None] * 6), protocol, *([None] * 17), *address.packed]
    return KnownPacket(
        transport_protocol=service.protocol,
        port=service.port,
        meta={
            _META_PROTOCOL: (0x0800 if address.version == 4 else 0x86DD).to_bytes(2, "big"),
            _META_IIF: struct.pack("=I", index),
            _META_IIFNAME: interface.encode().ljust(_INTERFACE_NAME_BYTES, b"\0"),
            _META_NFPROTO: bytes([nft.IPV4 if address.version == 4 else nft.IPV6]),
            _META_L4PROTO: bytes([protocol]),
        },
        conntrack={_CT_STATE: struct.pack("=I", CT_NEW)},
        network=network,
        transport=[None, None, *service.port.to_bytes(2, "big")],
    )


def read_ruleset() -> Ruleset:
    """The ruleset in the network namespace of the calling thread. Raises NetfixError."""
    with NetlinkSocket(NETLINK_NETFILTER, "reading nftables") as netlink:
        try:
            chains = base_chains(netlink)
            found = nft.rules(netlink) if chains else []
            places = {(chain.family, chain.table) for chain in chains}
            sets = {place: table_sets(netlink, *place) for place in places}
        except Refusal as refusal:
            raise from_errno(refusal.number, "reading nftables", refusal.detail) from refusal
    rules: dict[tuple[int, str, str], list[bytes]] = {}
    for rule in found:
        rules.setdefault((rule.family, rule.table, rule.chain), []).append(rule.expressions)
    return Ruleset(chains, rules, sets)
