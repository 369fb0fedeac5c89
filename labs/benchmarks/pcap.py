"""Counts in a packet capture what must not be there. A few lines instead of scapy: a capture may be large."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

EXPRESSION = "(host {address} and tcp[tcpflags] & tcp-rst != 0) or (icmp and icmp[icmptype] = icmp-unreach)"
"""What tcpdump is to record; `rejections` looks at every frame again."""

_MAGIC = 0xA1B2C3D4
_FILE_HEADER, _RECORD_HEADER = 24, 16
_ETHERNET = 14
_IPV4, _ICMP, _TCP = 0x0800, 1, 6
_RST = 0x04
_UNREACHABLE = 3


@dataclass(frozen=True)
class Rejections:
    """Frames by which a host tells a peer to go away."""

    rst: int = 0
    icmp_unreachable: int = 0


def rejections(path: Path, address: str) -> Rejections:
    """How many TCP resets to or from an IPv4 address, and how many ICMP "unreachable" to anybody."""
    service = ipaddress.ip_address(address).packed
    rst = unreachable = 0
    for frame in frames(path.read_bytes()):
        if len(frame) < _ETHERNET + 20 or struct.unpack_from("!H", frame, 12)[0] != _IPV4:
            continue
        protocol, ends = frame[_ETHERNET + 9], (frame[_ETHERNET + 12 : _ETHERNET + 16], frame[_ETHERNET + 16 :][:4])
        payload = frame[_ETHERNET + (frame[_ETHERNET] & 0x0F) * 4 :]
        rst += protocol == _TCP and service in ends and len(payload) > 13 and bool(payload[13] & _RST)
        unreachable += protocol == _ICMP and payload[:1] == bytes([_UNREACHABLE])
    return Rejections(rst, unreachable)


def frames(data: bytes) -> Iterator[bytes]:
    """The frames of a capture file; one that was cut off at the end is left out."""
    order = "<" if struct.unpack_from("<I", data)[0] == _MAGIC else ">"
    at = _FILE_HEADER
    while at + _RECORD_HEADER <= len(data):
        (length,) = struct.unpack_from(f"{order}I", data, at + 8)
        at += _RECORD_HEADER
        if at + length <= len(data):
            yield data[at : at + length]
        at += length
