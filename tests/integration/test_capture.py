"""What a move looks like on the wire (invariant I2): no RST, nobody told that the service is unreachable, announcements
of the service's own address from the right host, and never two hosts that answer for it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGINT

import pytest
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6NDOptDstLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet
from scapy.utils import RawPcapReader, wrpcap

from labs import config
from labs.lab import Lab
from tests.integration.asker import asking
from tests.integration.command import Livemove, migrate
from tests.integration.faults import held_criu
from tests.integration.scene import Scene

ADDRESS, ADDRESS6 = "192.0.2.211", "2001:db8::211"
SERVICE_BYTES = {socket.inet_aton(ADDRESS), socket.inet_pton(socket.AF_INET6, ADDRESS6)}
RST, TCP_FLAGS = 0x04, 13
DESTINATION_UNREACHABLE = 3


@dataclass
class Wire:
    """What a capture has, as far as it concerns one service."""

    resets: list[str] = field(default_factory=list)
    unreachable: list[str] = field(default_factory=list)
    announced: list[tuple[str, str]] = field(default_factory=list)
    """(address, MAC) of each gratuitous ARP or unsolicited neighbour advertisement, in order."""
    answered: list[tuple[str, str]] = field(default_factory=list)
    """(address, MAC) of each answer to a question, in order."""
    segments: int = 0
    _probes: int = 0

    @classmethod
    def read(cls, path: Path) -> Wire:
        wire = cls()
        with RawPcapReader(str(path)) as frames:
            for data, _ in frames:
                # Taking all the clients' traffic apart would take scapy longer than the move itself.
                if (segment := _tcp_segment(data)) is None:
                    wire._take(Ether(data))
                elif SERVICE_BYTES & {data[26:30], data[30:34], data[22:38], data[38:54]}:
                    wire.segments += 1
                    if segment[TCP_FLAGS] & RST:
                        wire.resets.append(Ether(data).summary())
        return wire

    def _take(self, frame: Packet) -> None:
        if ARP in frame:
            self._take_arp(frame[ARP])
        if (ICMP in frame and frame[ICMP].type == DESTINATION_UNREACHABLE) or ICMPv6DestUnreach in frame:
            self.unreachable.append(frame.summary())
        if ICMPv6ND_NS in frame and frame[ICMPv6ND_NS].tgt == ADDRESS6 and frame[IPv6].src == "::":
            self._probes += 1  # duplicate address detection, answered to all nodes (RFC 4861 section 7.2.4)
        if ICMPv6ND_NA in frame and frame[ICMPv6ND_NA].tgt == ADDRESS6:
            answer = frame[ICMPv6ND_NA]
            mac = frame[ICMPv6NDOptDstLLAddr].lladdr if ICMPv6NDOptDstLLAddr in frame else frame[Ether].src
            defends = not answer.S and self._probes > 0
            self._probes -= defends
            (self.answered if answer.S or defends else self.announced).append((ADDRESS6, mac))

    def _take_arp(self, arp: ARP) -> None:
        if arp.psrc == ADDRESS == arp.pdst:
            self.announced.append((ADDRESS, arp.hwsrc))
        elif arp.op == 2 and arp.psrc == ADDRESS:
            self.answered.append((ADDRESS, arp.hwsrc))


def _tcp_segment(data: bytes) -> bytes | None:
    """The TCP segment in an Ethernet frame, if there is one; no host of the lab uses IPv6 extension headers for it."""
    if data[12:14] == b"\x08\x00" and data[23] == socket.IPPROTO_TCP:
        return data[14 + (data[14] & 0xF) * 4 :]
    if data[12:14] == b"\x86\xdd" and data[20] == socket.IPPROTO_TCP:
        return data[54:]
    return None


def turns(claims: list[tuple[str, str]], address: str) -> list[str]:
    """The MACs that claimed an address, in order, each once as long as no other comes between."""
    macs = [mac for claimed, mac in claims if claimed == address]
    return [mac for number, mac in enumerate(macs) if number == 0 or macs[number - 1] != mac]


@pytest.fixture(scope="module")
def scene(lab: Lab) -> Iterator[Scene]:
    addresses = (f"{ADDRESS}/24", f"{ADDRESS6}/64")
    lab.add_workload(config.Workload("wire", "process", addresses, pid_file="/run/wire.pid"))
    scene = Scene.start(lab, "wire")
    yield scene
    scene.close()


def test_a_move_on_the_wire(lab: Lab, scene: Scene, tmp_path: Path) -> None:
    scene.begin_hop()
    source = scene.host
    with lab.capture(tmp_path / "move.pcap") as capture, asking(lab, ADDRESS, ADDRESS6):
        said = migrate(lab, "wire", "beta")
        scene.answers(100)
    assert said.status == 0, said.stderr
    scene.unharmed("beta")
    assert capture.dropped == 0
    wire = Wire.read(capture.path)
    assert wire.segments > 100
    assert (wire.resets, wire.unreachable) == ([], [])
    here, there = lab.machine(source).mac, lab.machine("beta").mac
    for address in (ADDRESS, ADDRESS6):
        assert turns(wire.announced, address) == [there]
        assert turns(wire.answered, address) == [here, there]


def test_an_aborted_move_on_the_wire(lab: Lab, scene: Scene, tmp_path: Path) -> None:
    """Interrupted in the freeze, when the destination has announced already: the source takes the address back."""
    scene.begin_hop()
    source = scene.host
    destination = "alpha" if source != "alpha" else "gamma"
    with (
        lab.capture(tmp_path / "abort.pcap") as capture,
        asking(lab, ADDRESS, ADDRESS6),
        held_criu(lab.host(destination)) as hold,
        Livemove(lab, "migrate", "wire", "--to", destination, "--json") as move,
    ):
        hold.reached(move)
        move.signal(SIGINT)
        scene.answers(100)  # while the destination's CRIU still stands where it was held
        hold.go()
        said = move.finish()
    assert said.status == 130, said.stderr
    scene.unharmed(source)
    assert capture.dropped == 0
    wire = Wire.read(capture.path)
    assert wire.segments > 100
    assert (wire.resets, wire.unreachable) == ([], [])
    here, there = lab.machine(source).mac, lab.machine(destination).mac
    for address in (ADDRESS, ADDRESS6):
        assert turns(wire.announced, address) == [there, here]
        assert turns(wire.answered, address) == [here, there, here]


def test_a_reset_would_be_seen(tmp_path: Path) -> None:
    ether = Ether(src="02:00:5e:00:53:0b", dst="02:00:5e:00:53:64")  # given, so that scapy asks nobody for them
    frames = [
        ether / IP(src="192.0.2.100", dst=ADDRESS) / TCP(flags="R"),
        ether / IPv6(src=ADDRESS6, dst="2001:db8::100") / TCP(flags="RA"),
        ether / IPv6(src=ADDRESS6, dst="2001:db8::100") / TCP(flags="A"),
        ether / IP(src="192.0.2.100", dst="192.0.2.11") / TCP(flags="R"),
        ether / IP(src="192.0.2.12", dst="192.0.2.100") / ICMP(type=DESTINATION_UNREACHABLE),
    ]
    wrpcap(str(tmp_path / "some.pcap"), frames)
    wire = Wire.read(tmp_path / "some.pcap")
    assert (len(wire.resets), wire.segments, len(wire.unreachable)) == (2, 3, 1)
