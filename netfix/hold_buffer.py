"""What a hold keeps, in which order, and what it gives up when it is full. Pure.

Bounded in packets and in bytes. When full the oldest UDP goes first: it is the packet that is worth least by now, and
nobody waits for its acknowledgement. Where there is no UDP the packet that has just come goes: everything else that
waits is TCP (or something as patient), whose sender sends again what is lost, and losing the newest of a connection
costs less than losing the oldest, without which the rest cannot be read.
"""

import struct
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

UDP, OTHER = 17, 0

_IPV4, _IPV6 = 0x0800, 0x86DD
_FRAGMENT = 44
_IPV6_EXTENSIONS = (0, 43, 60, _FRAGMENT)
"""Hop-by-hop options, routing, destination options, fragment (RFC 8200 section 4)."""
_COST_BYTES = 2304
"""What a small datagram takes of a receive buffer at most: an skb with a 2 KiB head (veth: 768, virtio_net: 2304)."""


class HeldPacket(NamedTuple):
    """A packet in the queue: its id there (ascending), `UDP` or `OTHER`, its bytes, and for UDP the port it goes to.

    Port 0: not known, because this is a later fragment. `head`: how the packet begins, for what is not UDP.
    """

    id: int
    protocol: int
    size: int
    port: int = 0
    head: bytes = b""


class Room(NamedTuple):
    """What the fullest receive buffer of a UDP port has left; `empty`: the service has read everything."""

    free_bytes: int
    empty: bool


@dataclass(frozen=True, slots=True)
class HoldLimits:
    """How much may wait at one time. Packets are counted whole, as they are before they are cut to the MTU."""

    packets: int = 32768
    bytes: int = 64 << 20


class BufferCounts(TypedDict):
    """The part of a `HoldReport` that is known here."""

    held_packets: int
    held_bytes: int
    waiting_packets: int
    waiting_bytes: int
    dropped_udp: int
    dropped_other: int


class Release(NamedTuple):
    """What to let go next: these ids; `whole`: they are the oldest there are, without a gap."""

    ids: list[int]
    whole: bool


def classify(ethertype: int, header: memoryview | bytes) -> tuple[int, int]:
    """`UDP` or `OTHER`, and the destination port, from the first bytes of an IP packet."""
    try:
        offset = -1  # of a UDP header; 0: it is in an earlier fragment
        if ethertype == _IPV4 and header[9] == UDP:
            offset = 0 if header[6] & 0x1F or header[7] else (header[0] & 0x0F) * 4
        elif ethertype == _IPV6:
            offset = _ipv6_udp_offset(header)
        if offset < 0:
            return OTHER, 0
        return UDP, (header[offset + 2] << 8 | header[offset + 3] if offset else 0)
    except (IndexError, struct.error):
        return OTHER, 0


def _ipv6_udp_offset(header: memoryview | bytes) -> int:
    """Where the UDP header is; 0 if it is in an earlier fragment, -1 if there is none."""
    kind, offset, here = header[6], 40, True
    while here and kind in _IPV6_EXTENSIONS:
        if kind == _FRAGMENT:
            here = not struct.unpack_from("!H", header, offset + 2)[0] & 0xFFF8
            kind, offset = header[offset], offset + 8
        else:
            kind, offset = header[offset], offset + 8 + 8 * header[offset + 1]
    if kind != UDP:
        return -1
    return offset if here else 0


def cost(packet: HeldPacket) -> int:
    """What a datagram takes of a receive buffer, estimated from above."""
    return _COST_BYTES if packet.size <= 1500 else _COST_BYTES + 2 * packet.size


class HoldBuffer:
    """The packets that are held, and the count of all that were. See the module for what happens when it is full."""

    def __init__(self, limits: HoldLimits) -> None:
        self._limits = limits
        self._packets: OrderedDict[int, HeldPacket] = OrderedDict()
        self._udp: OrderedDict[int, None] = OrderedDict()
        self._bytes = 0
        self._held_packets = 0
        self._held_bytes = 0
        self._dropped_udp = 0
        self._dropped_other = 0

    def __len__(self) -> int:
        return len(self._packets)

    def add(self, packet: HeldPacket) -> list[int]:
        """Keep it; the ids of what has to go for it, or its own."""
        self._packets[packet.id] = packet
        self._bytes += packet.size
        self._held_packets += 1
        self._held_bytes += packet.size
        if packet.protocol == UDP:
            self._udp[packet.id] = None
        if len(self._packets) <= self._limits.packets and self._bytes <= self._limits.bytes:
            return []
        return list(self._make_room(packet))

    def _make_room(self, packet: HeldPacket) -> Iterator[int]:
        while len(self._packets) > self._limits.packets or self._bytes > self._limits.bytes:
            victim = next(iter(self._udp), packet.id)
            if self._remove(victim).protocol == UDP:
                self._dropped_udp += 1
            else:
                self._dropped_other += 1
            yield victim

    def _remove(self, ident: int) -> HeldPacket:
        packet = self._packets.pop(ident)
        self._udp.pop(ident, None)
        self._bytes -= packet.size
        return packet

    def udp_ports(self) -> set[int]:
        """Where the datagrams that are held go."""
        return {self._packets[ident].port for ident in self._udp}

    def heads(self) -> Iterator[bytes]:
        """How the packets that are held begin, oldest first."""
        return (packet.head for packet in self._packets.values())

    def take(self, limit: int, rooms: dict[int, Room] | None = None) -> Release:
        """Take out the oldest, at most `limit`; with `rooms`, of the UDP only as much as fits where it goes.

        A port without an entry in `rooms` has no socket, and all the room in the world. Where a datagram does not
        fit, later ones for that port wait behind it; packets for others go past them.
        """
        ids: list[int] = []
        whole = True
        left = {port: room.free_bytes for port, room in (rooms or {}).items()}
        full: set[int] = set()
        for packet in self._packets.values():
            if len(ids) == limit:
                break
            port = packet.port
            if packet.protocol == UDP and rooms is not None and port in rooms:
                need = cost(packet)
                fresh = rooms[port].empty and left[port] == rooms[port].free_bytes
                if port in full or (need > left[port] and not fresh):
                    full.add(port)
                    whole = False
                    continue
                left[port] -= need
            ids.append(packet.id)
        for ident in ids:
            self._remove(ident)
        return Release(ids, whole)

    def counts(self) -> BufferCounts:
        """What there was and is."""
        return {
            "held_packets": self._held_packets,
            "held_bytes": self._held_bytes,
            "waiting_packets": len(self._packets),
            "waiting_bytes": self._bytes,
            "dropped_udp": self._dropped_udp,
            "dropped_other": self._dropped_other,
        }
