"""Segment sizes of restored connections, over sockets that are connected as CRIU connects them."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from coordinator.agent.mending import mend_segment_sizes

TCP_REPAIR, TCP_REPAIR_OPTIONS = 19, 22
ON, OFF_WITHOUT_PROBE = 1, -1
OPTION_MAXSEG = 2
SMALLEST, AGREED, TIMESTAMPS = 536, 1460, 12
ROUTER_ALERT = b"\x94\x04\x00\x00"


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def restored(opened: ExitStack) -> socket.socket:
    """A connection with a peer that does not exist, which agreed to segments of 1460 bytes. Nothing is sent."""
    sock = opened.enter_context(socket.socket())
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, ON)
    sock.bind(("127.0.0.1", 0))
    sock.connect(("127.0.0.1", 9))
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_OPTIONS, struct.pack("@II", OPTION_MAXSEG, AGREED))
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, OFF_WITHOUT_PROBE)
    opened.callback(sock.setsockopt, socket.IPPROTO_TCP, TCP_REPAIR, ON)  # closed without a FIN
    return sock


def segment_bytes(sock: socket.socket) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)


async def test_restored_connections_send_full_segments_again(opened: ExitStack) -> None:
    connections = [restored(opened) for _ in range(60)]  # more than one batch
    assert {segment_bytes(each) for each in connections} <= {SMALLEST, SMALLEST - TIMESTAMPS}
    await mend_segment_sizes(os.getpid())
    assert {segment_bytes(each) for each in connections} <= {AGREED, AGREED - TIMESTAMPS}


async def test_options_that_the_service_has_set_stay(opened: ExitStack) -> None:
    sock = restored(opened)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, ROUTER_ALERT)
    datagrams = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    datagrams.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, ROUTER_ALERT)
    await mend_segment_sizes(os.getpid())
    for each in (sock, datagrams):
        assert each.getsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, 40) == ROUTER_ALERT


async def test_other_sockets_and_processes_that_are_gone_do_not_matter(opened: ExitStack) -> None:
    for each in socket.socketpair():
        opened.enter_context(each)
    opened.enter_context(socket.create_server(("127.0.0.1", 0)))
    await mend_segment_sizes(os.getpid())
    await mend_segment_sizes(2**22 + 1)
