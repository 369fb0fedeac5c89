"""Announcing an address to one neighbour so that it acknowledges.

A gratuitous announcement is not answered: a switch or a port guard may have swallowed it. But whoever answers a
question that was asked *from* the address has taken in where that address is. IPv4: a receiver of an ARP request first
updates its entry for the sender, then answers (RFC 826, "Packet Reception"). IPv6: a neighbour solicitation with a
source link-layer address option updates the entry of its sender, and is answered to it (RFC 4861 section 7.2.3).

Pure, and without scapy: the neighbours are not known when the plan is made, where scapy is at hand.
"""

import ipaddress
import socket
import struct

from .unicast import parse_address

_ETH_P_ARP, _ETH_P_IPV6 = 0x0806, 0x86DD
_ETHERNET = struct.Struct("!6s6sH")
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_MINIMUM_BYTES = 60
_BROADCAST, _NOBODY = b"\xff" * 6, bytes(6)
_SOLICITATION, _ADVERTISEMENT = 135, 136
_SOURCE_LINK_LAYER_ADDRESS = 1


def question(address: str, mac: str, neighbour: str) -> bytes:
    """The frame that asks `neighbour` where it is, in the name of `address` at `mac`; both of one family.

    Raises InvalidAddressError.
    """
    sender, target = parse_address(address), ipaddress.ip_address(neighbour)
    own = bytes.fromhex(mac.replace(":", ""))
    if sender.version == 4:
        arp = _ARP.pack(1, 0x0800, 6, 4, 1, own, sender.packed, _NOBODY, target.packed)
        return (_ETHERNET.pack(_BROADCAST, own, _ETH_P_ARP) + arp).ljust(_MINIMUM_BYTES, b"\0")
    group = ipaddress.IPv6Address("ff02::1:ff00:0").packed[:13] + target.packed[13:]
    body = struct.pack("!BBHI16sBB6s", _SOLICITATION, 0, 0, 0, target.packed, _SOURCE_LINK_LAYER_ADDRESS, 1, own)
    total = _checksum(sender.packed + group + struct.pack("!II", len(body), socket.IPPROTO_ICMPV6) + body)
    body = body[:2] + struct.pack("!H", total) + body[4:]
    ip = _IPV6.pack(6 << 28, len(body), socket.IPPROTO_ICMPV6, 255, sender.packed, group)
    return _ETHERNET.pack(b"\x33\x33" + group[12:], own, _ETH_P_IPV6) + ip + body


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def acknowledger(frame: bytes, address: str) -> str | None:
    """The neighbour that answers a question of `address` in this frame, if that is what it is. Pure."""
    if len(frame) < _ETHERNET.size:
        return None
    asker = parse_address(address).packed
    ethertype, payload = _ETHERNET.unpack_from(frame)[2], frame[_ETHERNET.size :]
    if ethertype == _ETH_P_ARP and len(payload) >= _ARP.size:
        *kind, operation, _, neighbour, _, target = _ARP.unpack_from(payload)
        if (kind, operation, target) == ([1, 0x0800, 6, 4], 2, asker):
            return str(ipaddress.IPv4Address(neighbour))
    if ethertype == _ETH_P_IPV6 and len(payload) >= _IPV6.size + 24:
        _, _, following, _, _, target = _IPV6.unpack_from(payload)
        if (following, payload[_IPV6.size], target) == (socket.IPPROTO_ICMPV6, _ADVERTISEMENT, asker):
            return str(ipaddress.IPv6Address(payload[_IPV6.size + 8 : _IPV6.size + 24]))
    return None
