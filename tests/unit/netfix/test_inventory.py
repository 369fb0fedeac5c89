"""Findings over made-up sockets. With real ones: tests/contract/test_netfix_inventory.py."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from netfix import inventory as codes
from netfix.errors import InvalidAddressError
from netfix.inventory import OtherSocket, findings
from netfix.sockets import SocketRecord

A, A6 = "192.0.2.10", "2001:db8::10"
MINE, OTHERS = 11, 99
CONNECTION = SocketRecord("ipv4", "tcp", "ESTABLISHED", A, 7000, "192.0.2.1", 40000, MINE, 0, 0)
LISTENER = SocketRecord("ipv4", "tcp", "LISTEN", A, 7000, "0.0.0.0", 0, MINE, 0, 128)


def _codes(*records: SocketRecord, others: Sequence[OtherSocket] = (), inodes: Sequence[int] = (MINE,)) -> list[str]:
    return [one.code for one in findings(records, others, moving=[A, A6], inodes=inodes)]


def test_what_moves_has_no_findings() -> None:
    wildcard = replace(LISTENER, local="::", family="ipv6", remote="::")
    udp = replace(LISTENER, protocol="udp", state="UNCONNECTED", local=A6)
    assert _codes(CONNECTION, LISTENER, wildcard, udp) == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"ulp": "mptcp"}, codes.MPTCP),
        ({"ulp": "tls"}, codes.KTLS),
        ({"device": "eth0"}, codes.DEVICE),
        ({"local": "192.0.2.2"}, codes.ADDRESS_STAYS),
        ({"local": "127.0.0.1", "remote": "127.0.0.1"}, codes.LOCAL_PEER),
        ({"local": "ff02::fb", "protocol": "udp", "state": "UNCONNECTED"}, codes.MULTICAST),
    ],
)
def test_a_finding(change: dict[str, str], code: str) -> None:
    changed = replace(CONNECTION, **change)  # type: ignore[arg-type]
    assert _codes(changed) == [code]
    assert _codes(replace(changed, inode=OTHERS)) == [], "of another workload"


def test_one_socket_can_have_several() -> None:
    assert _codes(replace(CONNECTION, ulp="mptcp", device="eth0")) == [codes.MPTCP, codes.DEVICE]


def test_both_ends_of_a_local_connection_may_move() -> None:
    one = replace(CONNECTION, local="::1", local_port=1, remote="::1", remote_port=2)
    two = replace(CONNECTION, local="::1", local_port=2, remote="::1", remote_port=1, inode=12)
    assert _codes(one, two, inodes=[MINE, 12]) == []
    assert _codes(one, two) == [codes.LOCAL_PEER]


def test_what_passes_by_itself() -> None:
    nobody = replace(CONNECTION, inode=0)
    unfinished = replace(nobody, state="SYN_RECV")
    closing = replace(nobody, state="FIN_WAIT1", send_queue_bytes=10)
    done = replace(nobody, state="FIN_WAIT2")
    assert _codes(unfinished, closing, done, replace(unfinished, local="192.0.2.2")) == [
        codes.HANDSHAKE,
        codes.NOT_DELIVERED,
    ]
    assert _codes(replace(LISTENER, receive_queue_bytes=3)) == [codes.NOT_ACCEPTED]
    assert {codes.HANDSHAKE, codes.NOT_DELIVERED, codes.NOT_ACCEPTED} == codes.TRANSIENT


def test_other_kinds() -> None:
    others = [
        OtherSocket(codes.PACKET, 1),
        OtherSocket(codes.RAW, 2),
        OtherSocket(codes.UNIX, 3, peer_inode=4),
        OtherSocket(codes.UNIX, 4, peer_inode=3, name="@x"),
        OtherSocket(codes.UNIX, 5, peer_inode=0, name="/run/y"),
    ]
    assert _codes(others=others, inodes=[1, 2, 3]) == [codes.PACKET_SOCKET, codes.RAW_SOCKET, codes.UNIX_OUTSIDE]
    assert _codes(others=others, inodes=[3, 4, 5]) == []
    (finding,) = findings([], others, moving=[A], inodes=[3])
    assert "(@x)" in finding.message, "a client is named by what it is connected to"


def test_a_bad_address() -> None:
    with pytest.raises(InvalidAddressError):
        findings([], [], moving=["x"], inodes=[])
