"""The rules of a gate: which packets a host drops that does not answer, or lets nothing pass. Pure.

Not passing: whatever is addressed to the address is dropped in `prerouting` at priority -300 (raw), before connection
tracking and before a socket is looked up: so nothing that arrives can provoke a RST or an ICMP unreachable. With a
queue it goes into that instead, at the same place, and when it is let go it takes up its way there. Whatever
carries the address as its source is dropped in `output` at -300, before connection tracking could take a dying
socket's FIN or RST for the end of the connection, and again in `postrouting` at 300, where forwarded packets and
those that another table has rewritten come by. This holds on the loopback interface too: a client on the host itself
meets the same closed gate as one across the segment, since a connection to the copy that is left behind would be lost
anyway. (A service that also listens on 127.0.0.1 is not touched there.) A local sender gets EPERM from a dropped
packet; TCP treats that as a loss and sends again, and whoever could see it is frozen.

Not answering: no ARP packet that names the address as its sender leaves, be it reply **or request**: a host that asks
for a neighbour from the service address overwrites the neighbour's entry for that address (RFC 826; Linux
`arp_announce` 0 asks from the source address of the packet at hand). A source that is silent may thus fail to resolve
a neighbour it has no entry for; its known neighbours stay usable while their entries are probed again (three seconds,
`ucast_solicit`), and silence lasts some milliseconds. Requests for the address are dropped on their way in, so that
no work is done for them. The same in IPv6: no neighbour advertisement with the address as its target leaves, and no
neighbour discovery message at all (types 133 to 137, RFC 4861: they carry the sender's link-layer address) with the
address as its source; solicitations for the target are dropped on their way in. Other IPv6 packets tell nobody a
link-layer address.

Datagrams: UDP is the exception where the source freezes. What a task writes into a TCP connection behind a shut gate
stays in its send queue, and is sent by the copy that goes on; a datagram would be lost. The kernel sends none by
itself, neither later nor for a socket that dies, so only a task that still runs has any, and they may leave.

Alone: where the gate's network namespace is the service's alone, its MAC moves with it, and every frame tells a switch
where that is. One that does not answer therefore sends nothing at all, whatever its source: no segment of the service,
which stays in its send queue, and none of the kernel's own reports (IPv6 group memberships, address detection).

Releasing (passing, with a queue): everything goes out but one thing. To a segment that is let go and for which there is
no socket, the kernel answers with a RST; but it belongs to a connection that ended on the source, and whose peer sent
its last acknowledgement when its packets were diverted already. A RST that answers a segment with an acknowledgement
has no ACK flag itself (RFC 9293 section 3.10.7.1), while that of a socket, and the refusal of a new connection, have
one: it alone is dropped.

Neighbour discovery depends on `answering` alone: a holding destination answers although nothing else passes.
"""

import ipaddress
from collections.abc import Sequence
from typing import NamedTuple

from pyroute2.netlink.nfnetlink.nftsocket import Meta

from . import nft

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_RAW = -300
_NAME_BYTES = 16
"""IFNAMSIZ"""
_LAST = 300
CHAINS = (
    # family, name, hook number, priority (include/uapi/linux/netfilter.h, netfilter_arp.h)
    (nft.INET, "prerouting", 0, _RAW),
    (nft.INET, "output", 3, _RAW),
    (nft.INET, "postrouting", 4, _LAST),
    (nft.ARP, "input", 0, 0),
    (nft.ARP, "output", 1, 0),
)
FAMILIES = (nft.INET, nft.ARP)
SILENT_MARK = "silent"
SHUT_MARK = "shut"
QUEUE_MARK = "queue"
DATAGRAM_MARK = "datagrams"
UNKNOWN_MARK = "unknown"


class GateRule(NamedTuple):
    """One rule of a gate, before it is encoded."""

    family: int
    chain: str
    expressions: list[nft.Expression]
    comment: str


class Queue(NamedTuple):
    """Where inbound packets go that do not pass: the number of an NFQUEUE, and how a rule says it (see `nft`)."""

    number: int
    form: str


_IPV4 = nft.meta_is(Meta.NFT_META_NFPROTO, bytes([nft.IPV4]))
_IPV6 = nft.meta_is(Meta.NFT_META_NFPROTO, bytes([nft.IPV6]))
_ICMPV6 = [*_IPV6, *nft.meta_is(Meta.NFT_META_L4PROTO, bytes([58]))]
_NEIGHBOUR_DISCOVERY = [*_ICMPV6, *nft.transport_between(0, bytes([133]), bytes([137]))]
_SOLICITATION, _ADVERTISEMENT = bytes([135]), bytes([136])
_ND_TARGET_OFFSET = 8
_TCP, _TCP_FLAGS, _RST = 6, 13, 0x04
_ARP_OF_IPV4 = nft.network_is(2, b"\x08\x00\x06\x04")
"""Protocol type IPv4, hardware addresses of 6 bytes, protocol addresses of 4 (RFC 826)."""
_ARP_OPERATION, _ARP_SENDER, _ARP_TARGET = 6, 14, 24


def _source_is(address: Address) -> list[nft.Expression]:
    if address.version == 4:
        return [*_IPV4, *nft.network_is(12, address.packed)]
    return [*_IPV6, *nft.network_is(8, address.packed)]


def _destination_is(address: Address) -> list[nft.Expression]:
    if address.version == 4:
        return [*_IPV4, *nft.network_is(16, address.packed)]
    return [*_IPV6, *nft.network_is(24, address.packed)]


def _nd_is(kind: bytes, address: Address) -> list[nft.Expression]:
    return [*_ICMPV6, *nft.transport_is(0, kind), *nft.transport_is(_ND_TARGET_OFFSET, address.packed)]


def _silence(address: Address) -> list[GateRule]:
    """No answer, and nothing that would tell a neighbour that the address is here."""
    drop = nft.verdict(nft.DROP)
    comment = f"{SILENT_MARK} {address}"
    if address.version == 4:
        asked = [*_ARP_OF_IPV4, *nft.network_is(_ARP_OPERATION, b"\x00\x01")]
        return [
            GateRule(nft.ARP, "input", [*asked, *nft.network_is(_ARP_TARGET, address.packed), *drop], comment),
            GateRule(
                nft.ARP,
                "output",
                [*_ARP_OF_IPV4, *nft.network_is(_ARP_SENDER, address.packed), *drop],
                comment,
            ),
        ]
    from_address = [*_NEIGHBOUR_DISCOVERY, *nft.network_is(8, address.packed), *drop]
    return [
        GateRule(nft.INET, "prerouting", [*_nd_is(_SOLICITATION, address), *drop], comment),
        GateRule(nft.INET, "output", [*_nd_is(_ADVERTISEMENT, address), *drop], comment),
        GateRule(nft.INET, "output", from_address, comment),
    ]


def _shut(address: Address) -> list[GateRule]:
    """Nothing from the address goes out; neighbour discovery is not asked here."""
    return [
        GateRule(nft.INET, chain, [*_source_is(address), *nft.verdict(nft.DROP)], f"{SHUT_MARK} {address}")
        for chain in ("output", "postrouting")
    ]


def _let_datagrams_out(address: Address) -> list[GateRule]:
    """UDP from the address is let by, before the address is shut."""
    let_by = [*_source_is(address), *nft.meta_is(Meta.NFT_META_L4PROTO, bytes([17])), *nft.verdict(nft.ACCEPT)]
    return [GateRule(nft.INET, chain, let_by, f"{DATAGRAM_MARK} {address}") for chain in ("output", "postrouting")]


def _refuse_inbound(address: Address, queue: Queue | None) -> GateRule:
    """Nothing to the address comes in; it is kept where there is a queue to keep it in."""
    if queue is None:
        ending, comment = nft.verdict(nft.DROP), f"{SHUT_MARK} {address}"
    else:
        ending, comment = nft.to_queue(*queue), f"{QUEUE_MARK} {address} {queue.number}"
    return GateRule(nft.INET, "prerouting", [*_destination_is(address), *ending], comment)


def _unknown(address: Address) -> GateRule:
    """No RST for a segment that nobody here knows."""
    family = _IPV4 if address.version == 4 else _IPV6
    reset = [*family, *nft.meta_is(Meta.NFT_META_L4PROTO, bytes([_TCP])), *nft.transport_is(_TCP_FLAGS, bytes([_RST]))]
    comment = f"{UNKNOWN_MARK} {address}"
    return GateRule(nft.INET, "output", [*_source_is(address), *reset, *nft.verdict(nft.DROP)], comment)


def _mute() -> list[GateRule]:
    """Nothing at all leaves but over loopback."""
    drop = nft.verdict(nft.DROP)
    outward = nft.meta_is_not(Meta.NFT_META_OIFNAME, b"lo".ljust(_NAME_BYTES, b"\0"))
    return [GateRule(nft.INET, "output", [*outward, *drop], "mute"), GateRule(nft.ARP, "output", drop, "mute")]


def ruleset(
    addresses: Sequence[Address],
    *,
    answering: bool,
    passing: bool,
    datagrams: bool = False,
    queue: Queue | None = None,
    alone: bool = False,
) -> list[GateRule]:
    """All rules of a gate in that state, in their order."""
    found: list[GateRule] = _mute() if alone and not answering else []
    if not answering:
        found += [rule for address in addresses for rule in _silence(address)]
    if (not passing or queue) and any(address.version == 6 for address in addresses):
        # What is left of neighbour discovery is let by, before the addresses are shut.
        let_by = [*_NEIGHBOUR_DISCOVERY, *nft.verdict(nft.ACCEPT)]
        found += [
            GateRule(nft.INET, chain, let_by, "neighbour discovery")
            for chain in ("prerouting", "output", "postrouting")
        ]
    if not passing or queue:
        found += [_refuse_inbound(address, queue) for address in addresses]
    if datagrams:
        found += [rule for address in addresses for rule in _let_datagrams_out(address)]
    if passing and queue:
        found += [_unknown(address) for address in addresses]
    if not passing:
        found += [rule for address in addresses for rule in _shut(address)]
    return found
