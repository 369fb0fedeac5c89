"""Entries of the connection table: what moves, what becomes of it, and what is made up for sockets without one."""

from dataclasses import replace

import pytest

from netfix.conntrack_entry import (
    ASSURED,
    CLOSE,
    CLOSE_WAIT,
    CONFIRMED,
    DST_NAT,
    DYING,
    ESTABLISHED,
    LEAST_TIMEOUT_S,
    LIBERAL,
    SEEN_REPLY,
    SYN_SENT,
    TCP,
    TIME_WAIT,
    UDP,
    WINDOW_SCALE,
    Connection,
    Flow,
    TcpInfo,
    as_created,
    movable,
    untracked,
)
from netfix.ctnetlink import from_bytes, to_bytes
from netfix.sockets import SocketRecord

SERVICE, CLIENT = "192.0.2.10", "192.0.2.1"
INWARD = Flow(CLIENT, 50000, SERVICE, 7000)
ENTRY = Connection(
    TCP, INWARD, INWARD.reversed, SEEN_REPLY | ASSURED | CONFIRMED, 432_000, 7, 0, TcpInfo(3, 7, 9, 3, 3)
)
TRANSLATED = replace(ENTRY, reply=Flow(SERVICE, 8080, CLIENT, 50000), status=ENTRY.status | DST_NAT, zone=5)
DATAGRAMS = Connection(
    UDP, Flow("2001:db8::1", 53, "2001:db8::10", 9), Flow("2001:db8::10", 9, "2001:db8::1", 53), CONFIRMED, 30
)


def record(state: str, *, local_port: int = 7000, protocol: str = "tcp", local: str = SERVICE) -> SocketRecord:
    connected = state not in ("LISTEN", "UNCONNECTED")
    remote, port = (CLIENT, 50000) if connected else ("0.0.0.0", 0)
    return SocketRecord("ipv4", protocol, state, local, local_port, remote, port, 1, 0, 0)


def test_entries_survive_the_wire() -> None:
    assert from_bytes(to_bytes([ENTRY, TRANSLATED, DATAGRAMS])) == [ENTRY, TRANSLATED, DATAGRAMS]


def test_bytes_that_are_no_entries_are_none() -> None:
    assert from_bytes(b"") == []
    assert from_bytes(bytes(100)) == []
    whole = to_bytes([ENTRY])
    assert from_bytes(whole[:20]) == []
    icmp = bytearray(whole)
    icmp[52] = 1  # the protocol of the first tuple
    assert from_bytes(bytes(icmp)) == []


@pytest.mark.parametrize(
    ("state", "moves"), [(ESTABLISHED, True), (CLOSE_WAIT, True), (TIME_WAIT, False), (CLOSE, False)]
)
def test_what_is_over_does_not_move(state: int, moves: bool) -> None:
    assert movable(replace(ENTRY, tcp=TcpInfo(state))) is moves
    assert not movable(replace(DATAGRAMS, status=CONFIRMED | DYING))


def test_what_is_made_is_liberal_and_lasts_through_a_freeze() -> None:
    made = as_created(replace(ENTRY, status=0x5FFF & ~DYING, tcp=TcpInfo(3, 7, 9, 0xFF, WINDOW_SCALE)))
    assert made.tcp == TcpInfo(3, 7, 9, 0x0F, WINDOW_SCALE | LIBERAL)
    assert made.status == SEEN_REPLY | ASSURED | CONFIRMED | 0x30
    assert (made.timeout_s, made.mark) == (432_000, 7)
    assert as_created(DATAGRAMS).timeout_s == LEAST_TIMEOUT_S
    assert as_created(DATAGRAMS).tcp is None
    assert as_created(made) == made


def test_a_socket_with_an_entry_needs_no_other() -> None:
    records = [record("LISTEN"), record("ESTABLISHED")]
    assert untracked(records, [SERVICE], [ENTRY]) == []
    # To the service a connection that came to another port is one to its own.
    behind = replace(TRANSLATED, original=Flow(CLIENT, 50000, SERVICE, 80), reply=Flow(SERVICE, 7000, CLIENT, 50000))
    assert untracked(records, [SERVICE], [behind]) == []


def test_the_peer_has_connected_to_a_port_that_is_listened_on() -> None:
    (entry,) = untracked([record("LISTEN", local="0.0.0.0"), record("ESTABLISHED")], [SERVICE], [])
    assert (entry.original, entry.reply) == (INWARD, INWARD.reversed)
    assert entry.tcp == TcpInfo(ESTABLISHED)
    (datagrams,) = untracked(
        [record("UNCONNECTED", protocol="udp"), record("ESTABLISHED", protocol="udp")], [SERVICE], []
    )
    assert (datagrams.original, datagrams.tcp, datagrams.timeout_s) == (INWARD, None, LEAST_TIMEOUT_S)


def test_other_connections_are_the_service_s_own() -> None:
    (entry,) = untracked([record("SYN_SENT", local_port=40000)], [SERVICE], [])
    assert entry.original == Flow(SERVICE, 40000, CLIENT, 50000)
    assert (entry.status, entry.tcp) == (CONFIRMED, TcpInfo(SYN_SENT))


@pytest.mark.parametrize("state", ["TIME_WAIT", "CLOSE", "SYN_RECV", "BOUND", "LISTEN"])
def test_nothing_is_made_up_for_what_is_no_connection(state: str) -> None:
    assert untracked([record(state)], [SERVICE], []) == []


def test_other_addresses_stay() -> None:
    assert untracked([record("ESTABLISHED", local="192.0.2.2")], [SERVICE], []) == []
