"""TCP segments as a hold has them: to which connection they belong, and what they say besides their data. Pure.

A hold has the beginning of each packet, which is more than the longest headers (60 bytes of IPv4 or 40 of IPv6, 60 of
TCP). IPv6 with extension headers and fragments are not looked into: nobody sends a handshake so.
"""

import socket
import struct
from collections.abc import Collection, Iterable
from typing import NamedTuple

from .conntrack_entry import TCP, Flow

_FIN, _SYN, _RST, _PSH, _ACK, _URG = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_OFFSET, _FLAGS, _CHECKSUM, _URGENT = 12, 13, 16, 18
"""Of the fields in a TCP header (RFC 9293 section 3.1)."""
_LENGTH = struct.Struct("!H")


class _Layout(NamedTuple):
    """Where things are in one packet; `ends`: both addresses, `size`: what the IP header says of the whole packet."""

    ends: slice
    tcp: int
    size: int


def acknowledgements(packets: Iterable[bytes], flows: Collection[Flow]) -> list[bytes]:
    """What those of the packets that go the way of one of the flows say besides their data, in their order.

    A packet without data is taken over as it is; of one with data the acknowledgement alone, as a packet of its own.
    What opens or resets a connection is left out. The checksums are right, also where a network card should have
    filled them in later."""
    wanted = {_key(flow) for flow in flows}
    found = []
    for packet in packets:
        layout = _layout(packet)
        if layout is not None and packet[layout.ends] + packet[layout.tcp : layout.tcp + 4] in wanted:
            found.append(_without_data(packet, layout))
    return [each for each in found if each]


def _key(flow: Flow) -> bytes:
    family = socket.AF_INET6 if ":" in flow.source else socket.AF_INET
    ends = socket.inet_pton(family, flow.source) + socket.inet_pton(family, flow.destination)
    return ends + struct.pack("!HH", flow.source_port, flow.destination_port)


def _layout(packet: bytes) -> _Layout | None:
    """None: not TCP, or not to be read."""
    version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= 20 and packet[9] == TCP and not (packet[6] & 0x3F or packet[7]):
        found = _Layout(slice(12, 20), (packet[0] & 0x0F) * 4, _LENGTH.unpack_from(packet, 2)[0])
    elif version == 6 and len(packet) >= 40 and packet[6] == TCP:
        found = _Layout(slice(8, 40), 40, 40 + int(_LENGTH.unpack_from(packet, 4)[0]))
    else:
        return None
    complete = len(packet) >= found.tcp + 20 and len(packet) >= found.tcp + _header_bytes(packet, found)
    return found if complete else None


def _header_bytes(packet: bytes, layout: _Layout) -> int:
    return (packet[layout.tcp + _OFFSET] >> 4) * 4


def _without_data(packet: bytes, layout: _Layout) -> bytes:
    """Empty for what is no acknowledgement."""
    start, end = layout.tcp, layout.tcp + _header_bytes(packet, layout)
    segment = bytearray(packet[start:end])
    if not segment[_FLAGS] & _ACK or segment[_FLAGS] & (_SYN | _RST):
        return b""
    if layout.size != end:  # a FIN comes after the data
        segment[_FLAGS] &= ~(_FIN | _PSH | _URG)
        _LENGTH.pack_into(segment, _URGENT, 0)
    header = bytearray(packet[:start])
    if packet[0] >> 4 == 4:
        _LENGTH.pack_into(header, 2, end)
        _LENGTH.pack_into(header, 10, 0)
        _LENGTH.pack_into(header, 10, _checksum(header))
    else:
        _LENGTH.pack_into(header, 4, len(segment))
    _LENGTH.pack_into(segment, _CHECKSUM, 0)
    pseudo_header = packet[layout.ends] + struct.pack("!II", len(segment), TCP)
    _LENGTH.pack_into(segment, _CHECKSUM, _checksum(pseudo_header + segment))
    return bytes(header + segment)


def _checksum(data: bytes | bytearray) -> int:
    """RFC 1071. Both headers are multiples of four bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF & ~(total + (total >> 16))
