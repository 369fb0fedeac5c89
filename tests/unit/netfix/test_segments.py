"""What a packet says besides its data. Scapy makes the packets and checks what becomes of them."""

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.packet import Packet

from netfix.conntrack_entry import Flow
from netfix.segments import acknowledgements

PEER, SERVICE, PEER6, SERVICE6 = "192.0.2.99", "192.0.2.200", "2001:db8::99", "2001:db8::200"
FLOW, FLOW6 = Flow(PEER, 40000, SERVICE, 7000), Flow(PEER6, 40000, SERVICE6, 7000)
OPTIONS = [("NOP", None), ("NOP", None), ("Timestamp", (7, 8))]
HELD_BYTES = 128


def _segment(network: Packet, flags: str, data: bytes = b"", **fields: object) -> Packet:
    return network / TCP(sport=40000, dport=7000, seq=1001, ack=2002, flags=flags, options=OPTIONS, **fields) / data


V4, V6 = IP(src=PEER, dst=SERVICE, options=[b"\x01" * 4]), IPv6(src=PEER6, dst=SERVICE6)
EACH_FAMILY = pytest.mark.parametrize(("network", "flow"), [(V4, FLOW), (V6, FLOW6)])


def _said(*packets: Packet, flows: tuple[Flow, ...] = (FLOW, FLOW6)) -> list[bytes]:
    return acknowledgements([bytes(packet)[:HELD_BYTES] for packet in packets], flows)


@EACH_FAMILY
@pytest.mark.parametrize("flags", ["A", "FA"])
def test_a_segment_without_data_is_taken_over(network: Packet, flow: Flow, flags: str) -> None:
    packet = _segment(network, flags)
    assert _said(packet, flows=(flow,)) == [bytes(packet)]


@EACH_FAMILY
def test_of_one_with_data_the_acknowledgement(network: Packet, flow: Flow) -> None:
    packet = _segment(network, "FPAU", bytes(1000), urgptr=5)
    assert _said(packet, flows=(flow,)) == [bytes(_segment(network, "A"))]


@EACH_FAMILY
def test_a_checksum_that_a_network_card_should_have_made_is_made(network: Packet, flow: Flow) -> None:
    packet = _segment(network, "A", chksum=0x1234)
    assert _said(packet, flows=(flow,)) == [bytes(_segment(network, "A"))]


@EACH_FAMILY
def test_said_again_it_is_the_same(network: Packet, flow: Flow) -> None:
    once = _said(_segment(network, "A", b"data"), flows=(flow,))
    assert acknowledgements(once, [flow]) == once


@EACH_FAMILY
@pytest.mark.parametrize("flags", ["S", "SA", "R", "RA", "F", ""])
def test_what_acknowledges_nothing_or_ends_something_is_left_out(network: Packet, flow: Flow, flags: str) -> None:
    assert _said(_segment(network, flags), flows=(flow,)) == []


@pytest.mark.parametrize(
    "other",
    [
        FLOW._replace(source="192.0.2.98"),
        FLOW._replace(destination="192.0.2.201"),
        FLOW._replace(source_port=40001),
        FLOW._replace(destination_port=7001),
        FLOW.reversed,
        FLOW6,
    ],
)
def test_other_connections_are_left_out(other: Flow) -> None:
    assert _said(_segment(V4, "A"), flows=(other,)) == []


def test_the_order_stays() -> None:
    first, second = _segment(V4, "A", window=1), _segment(V6, "A", window=2)
    assert _said(first, _segment(V4, "S"), second) == [bytes(first), bytes(second)]


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\x45",
        b"\x60" + bytes(39),
        bytes(V4 / UDP(sport=40000, dport=7000)),
        bytes(V6 / UDP(sport=40000, dport=7000)),
        bytes(IPv6(src=PEER6, dst=SERVICE6) / IPv6ExtHdrDestOpt() / TCP(sport=40000, dport=7000, flags="A")),
        bytes(IP(src=PEER, dst=SERVICE, flags="MF") / TCP(sport=40000, dport=7000, flags="A")),
        bytes(IP(src=PEER, dst=SERVICE, frag=8, proto=6) / bytes(40)),
        bytes(_segment(V4, "A"))[:50],
        bytes(_segment(V6, "A"))[:65],
    ],
)
def test_what_cannot_be_read_is_left_out(packet: bytes) -> None:
    assert acknowledgements([packet], [FLOW, FLOW6]) == []
