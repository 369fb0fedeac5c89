"""What a hold does to real packets, on a cable between two network namespaces."""

import asyncio
import hashlib
import random
import socket
from contextlib import closing

from scapy.layers.inet import IP, TCP, UDP, fragment
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment, fragment6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from netfix import nft
from netfix.conntrack_entry import Flow
from netfix.gate import OPEN, NftGate, holding
from netfix.hold import NfqueueHold, hold_support
from netfix.hold_buffer import HoldLimits
from netfix.netlink import NETLINK_NETFILTER, NetlinkSocket
from tests.contract.netfix_held import datagram_socket, numbers_read, release, until_held
from tests.contract.netfix_segment import (
    EACH_FAMILY,
    HOST_MAC,
    PEER,
    PEER6,
    PEER_MAC,
    SERVICE,
    Segment,
    family_of,
)


async def test_this_kernel_can_hold_and_trying_leaves_nothing(cable: Segment) -> None:
    assert await cable.host.run(hold_support()) in ("queue", "target")

    def tables() -> list[nft.Table]:
        with NetlinkSocket(NETLINK_NETFILTER, "test") as netlink:
            return nft.tables(netlink)

    assert await cable.host.call(tables) == []


@EACH_FAMILY
async def test_a_handshake_waits_and_then_is_made(
    cable: Segment, gate: NftGate, hold: NfqueueHold, address: str
) -> None:
    listener = await cable.host.call(lambda: socket.create_server((address, 0), family=family_of(address)))
    client = await cable.peer.call(lambda: socket.socket(family_of(address)))
    loop = asyncio.get_running_loop()
    with listener, client:
        client.setblocking(False)
        connecting = asyncio.ensure_future(loop.sock_connect(client, listener.getsockname()[:2]))
        await until_held(cable.host, hold, lambda report: report.waiting_packets == 1)
        assert not connecting.done()
        await release(cable, hold, gate)
        await asyncio.wait_for(connecting, 10)
        service, _ = await asyncio.to_thread(listener.accept)
        with service:
            client.send(b"hello")
            assert service.recv(5) == b"hello"


@EACH_FAMILY
async def test_a_stream_in_large_segments_comes_out_whole(
    cable: Segment, gate: NftGate, hold: NfqueueHold, address: str
) -> None:
    """With segmentation offload a packet of a stream is up to 64 KiB; those are held and let go in one piece."""
    content = random.Random(1).randbytes(1 << 20)
    await gate.set(OPEN)
    listener = await cable.host.call(lambda: socket.create_server((address, 0), family=family_of(address)))
    with listener:
        where = listener.getsockname()[:2]
        client = await cable.peer.call(lambda: socket.create_connection(where, timeout=10))
        service, _ = listener.accept()
        with client, service:
            # Once there and back, so that the congestion window is no longer the initial one.
            first = asyncio.to_thread(client.sendall, content)
            await asyncio.gather(first, asyncio.to_thread(_read, service, len(content)))
            await gate.set(holding(hold.queue))
            sending = asyncio.create_task(asyncio.to_thread(client.sendall, content))
            report = await until_held(cable.host, hold, lambda report: report.waiting_packets > 0)
            assert report.waiting_bytes > 1500 * report.waiting_packets, "the packets are larger than the MTU"
            await release(cable, hold, gate)
            received = await asyncio.to_thread(_read, service, len(content))
            await sending
    assert hashlib.sha256(received).digest() == hashlib.sha256(content).digest()


def _read(service: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        data += service.recv(1 << 16)
    return bytes(data)


def _in_fragments(address: str) -> list[Packet]:
    ethernet = Ether(src=PEER_MAC, dst=HOST_MAC)
    datagram = UDP(sport=5, dport=9000) / Raw(b"7 " + bytes(3000))
    if ":" in address:
        whole = IPv6(src=PEER6, dst=address) / IPv6ExtHdrFragment() / datagram
        return [ethernet / part for part in fragment6(whole, 1280)]
    return [ethernet / part for part in fragment(IP(src=PEER, dst=address) / datagram, 1000)]


@EACH_FAMILY
async def test_fragments_are_held_and_put_together_behind(
    cable: Segment, gate: NftGate, hold: NfqueueHold, address: str
) -> None:
    with closing(await cable.host.call(lambda: datagram_socket(address, 9000))) as service:
        parts = _in_fragments(address)
        for part in parts:
            await cable.transmit(bytes(part))
        # One packet where the kernel's defragmentation (of connection tracking) comes before the gate.
        await until_held(cable.host, hold, lambda report: report.waiting_packets in (1, len(parts)))
        await cable.arrived()
        assert numbers_read(service) == []
        await release(cable, hold, gate)
        assert numbers_read(service) == [7]


@EACH_FAMILY
async def test_datagrams_keep_their_order_through_release_and_opening(
    cable: Segment, gate: NftGate, hold: NfqueueHold, address: str
) -> None:
    """A peer that sends on all the time: before, during and after the release, each datagram comes once, in order."""
    total, opened, sent_before = 600, asyncio.Event(), 200
    with (
        closing(await cable.host.call(lambda: datagram_socket(address, 9000))) as service,
        closing(await cable.peer.call(lambda: socket.socket(family_of(address), socket.SOCK_DGRAM))) as peer,
    ):
        service.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 21)

        async def send_on() -> None:
            for number in range(sent_before, total):
                peer.sendto(b"%d" % number, (address, 9000))
                await asyncio.sleep(0)
                if number == total // 2:
                    await opened.wait()

        for number in range(sent_before):
            peer.sendto(b"%d" % number, (address, 9000))
        sending = asyncio.create_task(send_on())
        await until_held(cable.host, hold, lambda report: report.waiting_packets >= sent_before)
        report = await release(cable, hold, gate)
        opened.set()
        await sending
        numbers = numbers_read(service)
        async with asyncio.timeout(10):
            while len(numbers) < total:
                await asyncio.sleep(0)
                numbers += numbers_read(service)
        assert sorted(numbers) == list(range(total))
        if report.late == 0:
            assert numbers == list(range(total))


async def test_udp_is_let_go_as_fast_as_the_service_reads(cable: Segment, gate: NftGate, hold: NfqueueHold) -> None:
    """What is held is several times what the socket's receive buffer takes."""
    total = 1000
    with (
        closing(await cable.host.call(lambda: datagram_socket(SERVICE, 9000))) as service,
        closing(await cable.peer.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))) as peer,
    ):
        service.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        for number in range(total):
            peer.sendto(b"%d" % number, (SERVICE, 9000))
        await until_held(cable.host, hold, lambda report: report.waiting_packets == total)
        received: list[int] = []
        all_read = asyncio.Event()
        reader = asyncio.get_running_loop()

        def read() -> None:
            received.extend(numbers_read(service))
            if len(received) >= total:
                all_read.set()

        reader.add_reader(service.fileno(), read)
        try:
            report = await release(cable, hold, gate)
            async with asyncio.timeout(10):
                await all_read.wait()
        finally:
            reader.remove_reader(service.fileno())
        assert received == list(range(total))
        assert (report.released, report.waiting_packets) == (total, 0)


async def test_a_service_that_does_not_read_its_datagrams_does_not_keep_others_waiting(
    cable: Segment, gate: NftGate, hold: NfqueueHold
) -> None:
    with (
        closing(await cable.host.call(lambda: datagram_socket(SERVICE, 9000))) as deaf,
        closing(await cable.host.call(lambda: datagram_socket(SERVICE, 9001))) as service,
        closing(await cable.peer.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))) as peer,
    ):
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for number in range(100):
            for port in (9000, 9001):
                peer.sendto(b"%d" % number, (SERVICE, port))
        await until_held(cable.host, hold, lambda report: report.waiting_packets == 200)
        report = await release(cable, hold, gate)
        assert (report.released, report.waiting_packets) == (200, 0)
        assert numbers_read(service) == list(range(100))
        deaf_got = numbers_read(deaf)
        assert 0 < len(deaf_got) < 100
        assert deaf_got == list(range(len(deaf_got)))


async def test_what_is_not_udp_is_dropped_when_it_comes_last(cable: Segment, gate: NftGate) -> None:
    small = NfqueueHold(HoldLimits(packets=3))
    await cable.host.run(small.open())
    try:
        await gate.set(holding(small.queue))
        for port in range(1, 6):
            syn = Ether(src=PEER_MAC, dst=HOST_MAC) / IP(src=PEER, dst=SERVICE) / TCP(dport=port, flags="S")
            await cable.transmit(bytes(syn))
        report = await until_held(cable.host, small, lambda report: report.held_packets == 5)
        assert (report.waiting_packets, report.dropped_udp, report.dropped_other) == (3, 0, 2)
        await release(cable, small, gate)
        answers = [frame for frame in await cable.arrived() if TCP in frame]
        assert [answer[TCP].sport for answer in answers] == [1, 2, 3], "the resets of closed ports, in order"
    finally:
        await cable.host.call(small.close)


def _from_peer(address: str, **fields: object) -> Ether:
    network = IPv6(src=PEER6, dst=address) if ":" in address else IP(src=PEER, dst=address)
    return Ether(src=PEER_MAC, dst=HOST_MAC) / network / TCP(**fields)


@EACH_FAMILY
async def test_nobody_is_reset_for_what_is_let_go_and_new_connections_are_refused(
    cable: Segment, gate: NftGate, hold: NfqueueHold, address: str
) -> None:
    """The first is of a connection that ended while its packets came here, the second to a port that nobody has."""
    await cable.transmit(bytes(_from_peer(address, sport=1, dport=9000, flags="A", seq=5, ack=7)))
    await cable.transmit(bytes(_from_peer(address, sport=2, dport=9000, flags="S")))
    await until_held(cable.host, hold, lambda report: report.waiting_packets == 2)
    await release(cable, hold, gate)
    answers = [(frame[TCP].dport, str(frame[TCP].flags)) for frame in await cable.arrived() if TCP in frame]
    assert answers == [(2, "RA")]
    await cable.transmit(bytes(_from_peer(address, sport=3, dport=9000, flags="A", seq=5, ack=7)))
    answers = [(frame[TCP].dport, str(frame[TCP].flags)) for frame in await cable.arrived() if TCP in frame]
    assert answers == [(3, "R")], "an open gate is in nobody's way"


@EACH_FAMILY
async def test_what_a_connection_has_sent_is_told_and_stays(
    cable: Segment, gate: NftGate, hold: NfqueueHold, address: str
) -> None:
    flow = Flow(PEER6 if ":" in address else PEER, 1, address, 9000)
    of_flow = {"sport": 1, "dport": 9000, "seq": 5, "ack": 7}
    await cable.transmit(bytes(_from_peer(address, **of_flow, flags="PA") / Raw(bytes(1000))))
    await cable.transmit(bytes(_from_peer(address, sport=2, dport=9000, flags="A")))
    await until_held(cable.host, hold, lambda report: report.waiting_packets == 2)
    for _ in range(2):
        expected = bytes(_from_peer(address, **of_flow, flags="A"))[14:]
        assert await cable.host.call(lambda: hold.kept([flow])) == [expected]
    assert await cable.host.call(lambda: hold.kept([])) == []
    assert (await release(cable, hold, gate)).released == 2
