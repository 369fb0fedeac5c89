"""Questions in the name of an address: the same frames as scapy's, and answers told from everything else."""

from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6NDOptSrcLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether

from netfix.questions import acknowledger, question

MAC, OTHER = "02:00:00:00:00:01", "02:00:00:00:00:02"
A, B, A6, B6 = "192.0.2.10", "192.0.2.1", "2001:db8::10", "2001:db8::1:2"


def test_an_arp_request_from_the_address() -> None:
    wanted = Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(op=1, hwsrc=MAC, psrc=A, hwdst="00:00:00:00:00:00", pdst=B)
    assert question(A, MAC, B) == bytes(wanted).ljust(60, b"\0")


def test_a_solicitation_from_the_address() -> None:
    wanted = (
        Ether(src=MAC, dst="33:33:ff:01:00:02")
        / IPv6(src=A6, dst="ff02::1:ff01:2", hlim=255)
        / ICMPv6ND_NS(tgt=B6)
        / ICMPv6NDOptSrcLLAddr(lladdr=MAC)
    )
    assert question(A6, MAC, B6) == bytes(wanted)


def test_the_answers_name_the_neighbour() -> None:
    reply = Ether(src=OTHER, dst=MAC) / ARP(op=2, hwsrc=OTHER, psrc=B, hwdst=MAC, pdst=A)
    assert acknowledger(bytes(reply), A) == B
    advertisement = Ether(src=OTHER, dst=MAC) / IPv6(src=B6, dst=A6, hlim=255) / ICMPv6ND_NA(tgt=B6, S=1)
    assert acknowledger(bytes(advertisement), A6) == B6


def test_other_frames_are_no_answers() -> None:
    for packet in (
        ARP(op=1, hwsrc=OTHER, psrc=B, pdst=A),
        ARP(op=2, hwsrc=OTHER, psrc=B, pdst="192.0.2.11"),
        IPv6(src=B6, dst="ff02::1", hlim=255) / ICMPv6ND_NA(tgt=B6),
        IPv6(src=B6, dst=A6, hlim=255) / ICMPv6ND_NS(tgt=B6),
    ):
        frame = Ether(src=OTHER, dst=MAC) / packet  # without these, scapy would ask the network
        assert (acknowledger(bytes(frame), A), acknowledger(bytes(frame), A6)) == (None, None)


@given(st.binary(max_size=120), st.sampled_from([b"", b"\x08\x06", b"\x86\xdd"]))
def test_no_frame_is_too_odd(data: bytes, kind: bytes) -> None:
    assert acknowledger(data[:12] + kind + data[12:], A) is None or len(data) >= 40
