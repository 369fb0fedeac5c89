"""What a hold keeps, in which order, and what goes first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.packet import Packet

from netfix.hold_buffer import OTHER, HeldPacket, HoldBuffer, HoldLimits, Room, classify, cost
from netfix.hold_buffer import UDP as DATAGRAM

EMPTY = Room(10_000, empty=True)


def _udp(ident: int, size: int = 100, port: int = 9000) -> HeldPacket:
    return HeldPacket(ident, DATAGRAM, size, port)


def _tcp(ident: int, size: int = 100) -> HeldPacket:
    return HeldPacket(ident, OTHER, size)


def _filled(*packets: HeldPacket, limits: HoldLimits | None = None) -> HoldBuffer:
    buffer = HoldBuffer(limits or HoldLimits())
    for packet in packets:
        buffer.add(packet)
    return buffer


@pytest.mark.parametrize(
    ("packet", "expected"),
    [
        (IP() / UDP(dport=53), (DATAGRAM, 53)),
        (IP(options=[b"\x01" * 8]) / UDP(dport=53), (DATAGRAM, 53)),
        (IP(frag=8, proto=17) / b"rest of it", (DATAGRAM, 0)),
        (IP() / TCP(dport=53), (OTHER, 0)),
        (IPv6() / UDP(dport=53), (DATAGRAM, 53)),
        (IPv6() / TCP(dport=53), (OTHER, 0)),
        (IPv6() / IPv6ExtHdrDestOpt() / IPv6ExtHdrFragment(offset=0, m=1) / UDP(dport=53), (DATAGRAM, 53)),
        (IPv6() / IPv6ExtHdrFragment(offset=9, nh=17) / b"rest of it", (DATAGRAM, 0)),
        (IPv6() / IPv6ExtHdrFragment(offset=9, nh=6) / b"rest of it", (OTHER, 0)),
    ],
)
def test_classification(packet: Packet, expected: tuple[int, int]) -> None:
    ethertype = 0x86DD if IPv6 in packet else 0x0800
    assert classify(ethertype, bytes(packet)) == expected


@given(st.sampled_from([0x0800, 0x86DD, 0x0806]), st.binary(max_size=128))
def test_no_bytes_are_too_strange_to_classify(ethertype: int, header: bytes) -> None:
    protocol, port = classify(ethertype, memoryview(header))
    assert protocol in (DATAGRAM, OTHER)
    assert 0 <= port <= 0xFFFF


def test_the_oldest_datagram_goes_first_and_then_what_comes() -> None:
    buffer = _filled(_tcp(1), _udp(2), _udp(3), limits=HoldLimits(packets=3))
    assert buffer.add(_tcp(4)) == [2]
    assert buffer.add(_udp(5)) == [3]
    assert buffer.add(_tcp(6)) == [5]
    assert buffer.add(_tcp(7)) == [7]
    assert buffer.take(10).ids == [1, 4, 6]
    counts = buffer.counts()
    assert (counts["dropped_udp"], counts["dropped_other"], counts["held_packets"]) == (3, 1, 7)


def test_a_large_packet_may_cost_several_small_ones() -> None:
    buffer = _filled(_udp(1), _udp(2), _tcp(3), limits=HoldLimits(bytes=350))
    assert buffer.add(_tcp(4, size=200)) == [1, 2]
    assert buffer.add(_tcp(5, size=400)) == [5]


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 70_000)), max_size=60),
    st.integers(1, 20),
    st.integers(1, 200_000),
)
def test_bounds_and_order_hold_whatever_comes(kinds: list[tuple[bool, int]], packets: int, size: int) -> None:
    buffer = HoldBuffer(HoldLimits(packets, size))
    dropped: list[int] = []
    for ident, (udp, length) in enumerate(kinds, start=1):
        dropped += buffer.add(_udp(ident, length) if udp else _tcp(ident, length))
        counts = buffer.counts()
        assert counts["waiting_packets"] <= packets
        assert counts["waiting_bytes"] <= size
    kept = buffer.take(len(kinds)).ids
    assert kept == sorted(kept)
    assert sorted(kept + dropped) == list(range(1, len(kinds) + 1))
    assert (buffer.counts()["waiting_packets"], buffer.counts()["waiting_bytes"]) == (0, 0)


def test_take_is_limited_and_whole_while_nothing_is_left_out() -> None:
    buffer = _filled(*(_udp(ident) for ident in range(1, 6)))
    assert buffer.take(2) == ([1, 2], True)
    assert buffer.take(9, {}) == ([3, 4, 5], True), "no socket there: nothing to wait for"
    assert buffer.take(9) == ([], True)


def test_datagrams_wait_for_room_and_others_go_past_them() -> None:
    each = cost(_udp(0))
    packets = [_udp(1), _udp(2), _tcp(3), _udp(4, port=53), _udp(5)]
    buffer = _filled(*packets)
    assert buffer.udp_ports() == {9000, 53}
    rooms = {9000: Room(each, empty=False), 53: EMPTY}
    assert buffer.take(9, rooms) == ([1, 3, 4], False)
    assert buffer.take(9, {9000: Room(each - 1, empty=False)}) == ([], False)
    assert buffer.take(9, rooms) == ([2], False)
    assert buffer.take(9, rooms) == ([5], True)


def test_a_datagram_larger_than_the_whole_buffer_gets_its_chance_when_that_is_empty() -> None:
    buffer = _filled(_udp(1, size=9000), _udp(2, size=9000))
    assert buffer.take(9, {9000: Room(500, empty=True)}) == ([1], False)
