"""Announcements and probes, field by field against the RFCs; scapy made them, struct reads them."""

import ipaddress
import struct

import pytest

from netfix.announce import announcement_frames, probe_frames
from netfix.errors import InvalidAddressError, UsageError

MAC = "02:00:5e:10:00:01"
MAC_BYTES = bytes.fromhex("02005e100001")
IPV4, IPV6 = "192.0.2.10", "2001:db8::1234:5678"
PACKED4, PACKED6 = ipaddress.ip_address(IPV4).packed, ipaddress.ip_address(IPV6).packed


def _arp(frame: bytes) -> tuple[object, ...]:
    assert len(frame) == 60
    assert frame[42:] == bytes(18), "padding"
    return struct.unpack_from("!6s6sH HHBBH 6s4s6s4s", frame)


def test_gratuitous_arp_as_request() -> None:
    request, _ = announcement_frames(IPV4, MAC)
    ethernet = (b"\xff" * 6, MAC_BYTES, 0x0806)
    assert _arp(request) == (*ethernet, 1, 0x0800, 6, 4, 1, MAC_BYTES, PACKED4, bytes(6), PACKED4)


def test_gratuitous_arp_as_reply() -> None:
    _, reply = announcement_frames(IPV4, MAC)
    ethernet = (b"\xff" * 6, MAC_BYTES, 0x0806)
    assert _arp(reply) == (*ethernet, 1, 0x0800, 6, 4, 2, MAC_BYTES, PACKED4, MAC_BYTES, PACKED4)


def test_arp_probe_claims_nothing() -> None:
    (probe,) = probe_frames(IPV4, MAC)
    ethernet = (b"\xff" * 6, MAC_BYTES, 0x0806)
    assert _arp(probe) == (*ethernet, 1, 0x0800, 6, 4, 1, MAC_BYTES, bytes(4), bytes(6), PACKED4)


def _icmpv6_checksum(ip: bytes) -> int:
    """RFC 4443 section 2.3: over the pseudo-header and the message; 0 when the checksum in it is right."""
    length = int.from_bytes(ip[4:6], "big")
    message = ip[40 : 40 + length]
    data = ip[8:40] + struct.pack("!II", length, 58) + message + b"\0" * (len(message) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _ipv6(frame: bytes) -> tuple[object, ...]:
    """Ethernet addresses, type; next header, hop limit, source, destination; ICMPv6 type and code."""
    assert len(frame) >= 60
    assert _icmpv6_checksum(frame[14:]) == 0
    ethernet = struct.unpack_from("!6s6sH", frame)
    ip = struct.unpack_from("!BB16s16s", frame, 14 + 6)
    return (*ethernet, *ip, frame[54], frame[55])


def test_unsolicited_neighbour_advertisement() -> None:
    (frame,) = announcement_frames(IPV6, MAC)
    all_nodes = ipaddress.ip_address("ff02::1").packed
    group_mac = bytes.fromhex("333300000001")
    assert _ipv6(frame) == (group_mac, MAC_BYTES, 0x86DD, 58, 255, PACKED6, all_nodes, 136, 0)
    (flags,) = struct.unpack_from("!I", frame, 58)
    assert flags == 0x20000000, "override; neither router nor solicited"
    assert frame[62:78] == PACKED6
    assert frame[78:] == b"\x02\x01" + MAC_BYTES, "target link-layer address"


def test_neighbour_solicitation_as_in_duplicate_address_detection() -> None:
    (frame,) = probe_frames(IPV6, MAC)
    group = ipaddress.ip_address("ff02::1:ff34:5678").packed
    group_mac = bytes.fromhex("3333ff345678")
    assert _ipv6(frame) == (group_mac, MAC_BYTES, 0x86DD, 58, 255, bytes(16), group, 135, 0)
    assert frame[62:78] == PACKED6
    assert len(frame) == 78, "no source link-layer address from the unspecified address (RFC 4861 section 4.3)"


@pytest.mark.parametrize("build", [announcement_frames, probe_frames])
@pytest.mark.parametrize("mac", ["", "02:00:5e:10:00", "02-00-5e-10-00-01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"])
def test_only_a_unicast_mac_announces(build: object, mac: str) -> None:
    assert callable(build)
    with pytest.raises(UsageError, match="MAC"):
        build(IPV4, mac)
    with pytest.raises(InvalidAddressError):
        build("nowhere", MAC)
