"""Findings about real sockets, in network namespaces."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from netfix import inventory as codes
from netfix.gate import OPEN, NftGate, holding
from netfix.hold import NfqueueHold
from netfix.inventory import SocketFinding, inspect
from netfix.sockets import DiagSocketInventory
from tests.contract.netfix_segment import HOST, HOST_MAC, PEER, PEER_MAC, SERVICE, SERVICE6, Segment

MOVING = [SERVICE, SERVICE6]


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


async def _findings(cable: Segment, *owned: socket.socket) -> list[SocketFinding]:
    """The findings, as if these sockets were the workload's."""
    reader = await cable.host.call(DiagSocketInventory)
    try:
        return await cable.host.run(inspect(reader, MOVING, {os.fstat(one.fileno()).st_ino for one in owned}))
    finally:
        reader.close()


async def _listener(cable: Segment, opened: ExitStack, address: str = SERVICE, protocol: int = 0) -> socket.socket:
    def made() -> socket.socket:
        one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, protocol)
        one.bind((address, 0))
        one.listen(8)
        return one

    return opened.enter_context(await cable.host.call(made))


async def _connect(cable: Segment, opened: ExitStack, listener: socket.socket) -> socket.socket:
    where = listener.getsockname()[:2]
    return opened.enter_context(await cable.peer.call(lambda: socket.create_connection(where, timeout=5)))


@pytest.mark.parametrize("address", [SERVICE, SERVICE6, "0.0.0.0", "::"])
async def test_an_ordinary_service_can_move(cable: Segment, opened: ExitStack, address: str) -> None:
    listener = await _listener(cable, opened, address)
    where = (SERVICE if "." in address else SERVICE6, listener.getsockname()[1])
    opened.enter_context(await cable.peer.call(lambda: socket.create_connection(where, timeout=5)))
    service = opened.enter_context(listener.accept()[0])
    assert await _findings(cable, listener, service) == []


async def test_multipath_tcp(cable: Segment, opened: ExitStack) -> None:
    listener = await _listener(cable, opened, protocol=socket.IPPROTO_MPTCP)
    (finding,) = await _findings(cable, listener)
    assert (finding.code, finding.fatal) == (codes.MPTCP, True)
    assert "mptcp" in finding.hint


async def test_sockets_on_addresses_that_stay(cable: Segment, opened: ExitStack) -> None:
    listener = await _listener(cable, opened, HOST)
    (finding,) = await _findings(cable, listener)
    assert (finding.code, finding.fatal) == (codes.ADDRESS_STAYS, True)
    assert HOST in finding.message


async def test_a_connection_to_a_process_of_the_host(cable: Segment, opened: ExitStack) -> None:
    listener = await _listener(cable, opened, "127.0.0.1")
    where = listener.getsockname()
    client = opened.enter_context(await cable.host.call(lambda: socket.create_connection(where, timeout=5)))
    other = opened.enter_context(listener.accept()[0])
    assert [one.code for one in await _findings(cable, client)] == [codes.LOCAL_PEER]
    assert await _findings(cable, client, other, listener) == []


async def test_a_socket_bound_to_a_device(cable: Segment, opened: ExitStack) -> None:
    def bind() -> socket.socket:
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        one.bind((SERVICE, 0))
        return one

    bound = opened.enter_context(await cable.host.call(bind))
    (finding,) = await _findings(cable, bound)
    assert (finding.code, finding.fatal) == (codes.DEVICE, False)
    assert "eth0" in finding.message


async def test_a_socket_bound_to_a_multicast_group(cable: Segment, opened: ExitStack) -> None:
    def bind() -> socket.socket:
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        one.bind(("224.0.0.251", 5353))
        return one

    bound = opened.enter_context(await cable.host.call(bind))
    assert [one.code for one in await _findings(cable, bound)] == [codes.MULTICAST]


async def test_packet_and_raw_sockets(cable: Segment, opened: ExitStack) -> None:
    def make(family: int, protocol: int) -> socket.socket:
        return opened.enter_context(socket.socket(family, socket.SOCK_RAW, protocol))

    packet = await cable.host.call(lambda: make(socket.AF_PACKET, socket.htons(0x0806)))
    raw = await cable.host.call(lambda: make(socket.AF_INET, socket.IPPROTO_ICMP))
    raw6 = await cable.host.call(lambda: make(socket.AF_INET6, socket.IPPROTO_ICMPV6))
    found = await _findings(cable, packet, raw, raw6)
    assert [one.code for one in found] == [codes.PACKET_SOCKET, codes.RAW_SOCKET, codes.RAW_SOCKET]
    assert {one.inode for one in found} == {os.fstat(one.fileno()).st_ino for one in (packet, raw, raw6)}
    assert await _findings(cable) == [], "another's"


async def test_unix_sockets_whose_other_end_stays(cable: Segment, opened: ExitStack) -> None:
    def pair(name: str) -> tuple[socket.socket, socket.socket, socket.socket]:
        listener = opened.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(name)
        listener.listen(1)
        client = opened.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(name)
        return listener, client, opened.enter_context(listener.accept()[0])

    listener, client, server = await cable.host.call(lambda: pair("\0livemove-test"))
    (finding,) = await _findings(cable, client)
    assert (finding.code, finding.fatal) == (codes.UNIX_OUTSIDE, True)
    assert "@livemove-test" in finding.message
    assert await _findings(cable, client, server, listener) == []
    assert await _findings(cable, listener) == [], "nobody is connected to the listener itself"


async def test_connections_that_nobody_has_accepted(cable: Segment, opened: ExitStack) -> None:
    listener = await _listener(cable, opened)
    for _ in range(2):
        await _connect(cable, opened, listener)
    (finding,) = await _findings(cable, listener)
    assert (finding.code, finding.fatal) == (codes.NOT_ACCEPTED, True)
    assert finding.message.startswith("2 connection(s)")
    assert finding.code in codes.TRANSIENT
    for _ in range(2):
        opened.enter_context(listener.accept()[0])
    assert await _findings(cable, listener) == []


async def test_a_handshake_that_is_not_finished(cable: Segment, opened: ExitStack) -> None:
    listener = await _listener(cable, opened)
    syn = IP(src=PEER, dst=SERVICE) / TCP(sport=7, dport=listener.getsockname()[1], flags="S")
    # A peer that has nothing on port 7 would reset it at once: the answer must not get there.
    syn.src = "192.0.2.66"
    await cable.transmit(bytes(Ether(src=PEER_MAC, dst=HOST_MAC) / syn))
    await cable.arrived()
    (finding,) = await _findings(cable, listener)
    assert (finding.code, finding.inode) == (codes.HANDSHAKE, 0)


async def test_what_is_closed_and_not_delivered(cable: Segment, opened: ExitStack) -> None:
    """The peer's acknowledgements are kept in a hold; so the service's last words are not acknowledged."""
    listener = await _listener(cable, opened)
    gate = await cable.host.call(lambda: NftGate("test", [SERVICE]))
    hold = NfqueueHold()
    await cable.host.run(hold.open())
    try:
        await _connect(cable, opened, listener)
        service = listener.accept()[0]
        await gate.set(OPEN)
        assert hold.queue is not None
        await gate.set(holding(hold.queue))
        service.sendall(b"last words")
        service.close()
        (finding,) = await _findings(cable, listener)
        assert (finding.code, finding.fatal) == (codes.NOT_DELIVERED, False)
        assert "11 byte(s)" in finding.message, "and the FIN"
    finally:
        await cable.host.call(hold.close)
        gate.close()


async def test_hundreds_of_sockets_are_one_picture(cable: Segment, opened: ExitStack) -> None:
    """More than fits into one answer of the kernel."""

    def bind(count: int) -> list[socket.socket]:
        made = []
        for port in range(10000, 10000 + count):
            one = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            one.bind((SERVICE, port))
            made.append(one)
        return made

    made = await cable.host.call(lambda: bind(600))
    reader = await cable.host.call(DiagSocketInventory)
    try:
        records = await reader.sockets()
    finally:
        reader.close()
    assert {record.local_port for record in records} == set(range(10000, 10600))
    assert await _findings(cable, *made) == []
