"""The frames that tell a segment where an address is, and those that ask who has it.

Pure: made with scapy where the plan is made, handed to hosts as bytes, sent by `frames`. Only this module imports
scapy. All frames are whole Ethernet frames padded to 60 bytes (IEEE 802.3's minimum without the checksum, which
the interface adds).
"""

from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6NDOptDstLLAddr,
    IPv6,
    in6_getnsma,
    in6_getnsmac,
)
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet

from .errors import UsageError
from .unicast import parse_address

_BROADCAST = "ff:ff:ff:ff:ff:ff"
_NOBODY = "00:00:00:00:00:00"
_ALL_NODES = "ff02::1"
_ALL_NODES_MAC = "33:33:00:00:00:01"
_MINIMUM_BYTES = 60
_REQUEST, _REPLY = 1, 2


def announcement_frames(address: str, mac: str) -> tuple[bytes, ...]:
    """The frames that say "`address` is at `mac`" to everybody on the segment; `mac` is that of the sending interface.

    IPv4: a gratuitous ARP as request (the form of RFC 5227 section 3) and as reply (RFC 5944 section 4.6 allows both;
    some hosts and switches heed only one). In both, sender and target address are the address; in the reply the
    target hardware address is the MAC, without which Linux does not take it as gratuitous (net/ipv4/arp.c,
    arp_is_garp). IPv6: an unsolicited neighbour advertisement to all nodes with the override flag (RFC 4861 section
    7.2.6). Raises InvalidAddressError, UsageError.
    """
    target = parse_address(address)
    mac = _unicast_mac(mac)
    ethernet = Ether(src=mac, dst=_BROADCAST)
    if target.version == 4:
        same = {"hwsrc": mac, "psrc": str(target), "pdst": str(target)}
        return (
            _frame(ethernet / ARP(op=_REQUEST, hwdst=_NOBODY, **same)),
            _frame(ethernet / ARP(op=_REPLY, hwdst=mac, **same)),
        )
    advertisement = ICMPv6ND_NA(R=0, S=0, O=1, tgt=str(target)) / ICMPv6NDOptDstLLAddr(lladdr=mac)
    ip = IPv6(src=str(target), dst=_ALL_NODES, hlim=255)
    return (_frame(Ether(src=mac, dst=_ALL_NODES_MAC) / ip / advertisement),)


def probe_frames(address: str, mac: str) -> tuple[bytes, ...]:
    """The frame that asks who has `address` without claiming it or teaching anybody anything.

    IPv4: an ARP probe, sender address 0.0.0.0 (RFC 5227 section 2.1.1). IPv6: a neighbour solicitation as in duplicate
    address detection, from the unspecified address to the solicited-node group (RFC 4862 section 5.4.2); the answer
    goes to all nodes. Raises InvalidAddressError, UsageError.
    """
    target = parse_address(address)
    mac = _unicast_mac(mac)
    if target.version == 4:
        probe = ARP(op=_REQUEST, hwsrc=mac, psrc="0.0.0.0", hwdst=_NOBODY, pdst=str(target))
        return (_frame(Ether(src=mac, dst=_BROADCAST) / probe),)
    group = in6_getnsma(target.packed)
    ip = IPv6(src="::", dst=_compressed(group), hlim=255)
    return (_frame(Ether(src=mac, dst=in6_getnsmac(group)) / ip / ICMPv6ND_NS(tgt=str(target))),)


def _compressed(packed: bytes) -> str:
    return f"{packed[0]:02x}{packed[1]:02x}:" + ":".join(packed[i : i + 2].hex() for i in range(2, 16, 2))


def _frame(packet: Packet) -> bytes:
    return bytes(packet).ljust(_MINIMUM_BYTES, b"\0")


def _unicast_mac(text: str) -> str:
    """The MAC in lower case with colons. Raises UsageError unless it is a unicast MAC of six bytes."""
    try:
        octets = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        octets = b""
    if len(octets) != 6 or text.count(":") != 5 or octets[0] & 1 or not any(octets):
        raise UsageError(f"{text!r} is not the MAC address of an interface", hint="e.g. 02:00:5e:10:00:01")
    return octets.hex(":")
