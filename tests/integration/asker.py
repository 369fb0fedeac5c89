"""Somebody on the segment who keeps asking who has an address, as routers and new clients do."""

from __future__ import annotations

import ipaddress
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from scapy.layers.inet6 import ICMPv6ND_NS, ICMPv6NDOptSrcLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether

from labs.lab import Lab
from labs.topology import INTERFACE

#: Frames are given as hex. Bounded: it ends by itself after half a minute.
_ASK = """\
import socket, sys, time
port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
port.bind((sys.argv[1], 0))
frames = [bytes.fromhex(text) for text in sys.argv[2:]]
print("asking", flush=True)
for _ in range(3000):
    for frame in frames:
        port.send(frame)
    time.sleep(0.01)
"""


@contextmanager
def asking(lab: Lab, *addresses: str) -> Iterator[None]:
    """Ask for every address 100 times a second from the operator machine, for the length of a `with` block."""
    machine = lab.machine("operator")
    frames = [_question(machine.mac, machine.address, machine.address6, address).hex() for address in addresses]
    process = machine.popen(["python3", "-I", "-c", _ASK, INTERFACE, *frames], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "asking\n"
        yield
    finally:
        process.kill()
        process.communicate()


def _question(mac: str, sender: str, sender6: str, address: str) -> bytes:
    """An ARP request or neighbour solicitation as the kernel of a neighbour sends it."""
    if ":" not in address:
        request = ARP(op=1, hwsrc=mac, psrc=sender, hwdst="00:00:00:00:00:00", pdst=address)
        return bytes(Ether(src=mac, dst="ff:ff:ff:ff:ff:ff") / request)
    last = ipaddress.ip_address(address).packed[-3:]
    group = ipaddress.IPv6Address(bytes.fromhex("ff0200000000000000000001ff") + last)
    group_mac = "33:33:" + ":".join(f"{octet:02x}" for octet in group.packed[-4:])
    solicitation = ICMPv6ND_NS(tgt=address) / ICMPv6NDOptSrcLLAddr(lladdr=mac)
    return bytes(Ether(src=mac, dst=group_mac) / IPv6(src=sender6, dst=str(group), hlim=255) / solicitation)
