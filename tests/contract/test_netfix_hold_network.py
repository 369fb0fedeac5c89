"""What a hold does to real packets, on a cable between two network namespaces."""

import asyncio
import hashlib
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP, UDP, fragment
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment, fragment6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from netfix import nft
from netfix.conntrack_entry import Flow
from netfix.errors import KernelRefusedError
from netfix.gate import CLOSED, OPEN, NftGate, holding, releasing, remove_gate
from netfix.hold import HoldReport, NfqueueHold, hold_support
from netfix.hold_buffer import HoldLimits
from netfix.hooks import Hooks
from netfix.leftovers import find_leftovers, remove_leftover
from netfix.netlink import NETLINK_NETFILTER, NetlinkSocket
from tests.contract.netfix_segment import (
    HOST_MAC,
    PEER,
    PEER6,
    PEER_MAC,
    SERVICE,
    SERVICE6,
    Namespace,
    Segment,
    segment,
)

EACH_FAMILY = pytest.mark.parametrize("address", [SERVICE, SERVICE6])
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
async def cable() -> AsyncIterator[Segment]:
    async with segment() as built:
        yield built


@pytest.fixture
async def gate(cable: Segment) -> AsyncIterator[NftGate]:
    made = await cable.host.call(lambda: NftGate("test", [SERVICE, SERVICE6]))
    yield made
    made.close()


@pytest.fixture
async def hold(cable: Segment, gate: NftGate) -> AsyncIterator[NfqueueHold]:
    """A hold that is open, behind a gate that queues."""
    made = NfqueueHold()
    await cable.host.run(made.open())
    await gate.set(holding(made.queue))
    yield made
    await cable.host.call(made.close)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _datagram_socket(address: str, port: int = 0) -> socket.socket:
    made = socket.socket(_family(address), socket.SOCK_DGRAM)
    made.bind((address, port))
    made.setblocking(False)
    return made


async def _until(host: Namespace, hold: NfqueueHold, enough: Callable[[HoldReport], bool]) -> HoldReport:
    """The hold's report as soon as it says that enough has come."""
    async with asyncio.timeout(10):
        while True:
            report = await host.call(hold.report)
            if enough(report):
                return report
            await asyncio.sleep(0)


async def _release(cable: Segment, hold: NfqueueHold, gate: NftGate) -> HoldReport:
    await gate.set(releasing(hold.queue))
    return await cable.host.run(hold.release(lambda: gate.set(OPEN)))


def _numbers(service: socket.socket) -> list[int]:
    found = []
    while True:
        try:
            found.append(int(service.recv(65536).split(b" ", 1)[0]))
        except BlockingIOError:
            return found


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
    listener = await cable.host.call(lambda: socket.create_server((address, 0), family=_family(address)))
    client = await cable.peer.call(lambda: socket.socket(_family(address)))
    loop = asyncio.get_running_loop()
    with listener, client:
        client.setblocking(False)
        connecting = asyncio.ensure_future(loop.sock_connect(client, listener.getsockname()[:2]))
        await _until(cable.host, hold, lambda report: report.waiting_packets == 1)
        assert not connecting.done()
        await _release(cable, hold, gate)
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
    listener = await cable.host.call(lambda: socket.create_server((address, 0), family=_family(address)))
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
            report = await _until(cable.host, hold, lambda report: report.waiting_packets > 0)
            assert report.waiting_bytes > 1500 * report.waiting_packets, "the packets are larger than the MTU"
            await _release(cable, hold, gate)
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
    with closing(await cable.host.call(lambda: _datagram_socket(address, 9000))) as service:
        parts = _in_fragments(address)
        for part in parts:
            await cable.transmit(bytes(part))
        # One packet where the kernel's defragmentation (of connection tracking) comes before the gate.
        await _until(cable.host, hold, lambda report: report.waiting_packets in (1, len(parts)))
        await cable.arrived()
        assert _numbers(service) == []
        await _release(cable, hold, gate)
        assert _numbers(service) == [7]


@EACH_FAMILY
async def test_datagrams_keep_their_order_through_release_and_opening(
    cable: Segment, gate: NftGate, hold: NfqueueHold, address: str
) -> None:
    """A peer that sends on all the time: before, during and after the release, each datagram comes once, in order."""
    total, opened, sent_before = 600, asyncio.Event(), 200
    with (
        closing(await cable.host.call(lambda: _datagram_socket(address, 9000))) as service,
        closing(await cable.peer.call(lambda: socket.socket(_family(address), socket.SOCK_DGRAM))) as peer,
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
        await _until(cable.host, hold, lambda report: report.waiting_packets >= sent_before)
        report = await _release(cable, hold, gate)
        opened.set()
        await sending
        numbers = _numbers(service)
        async with asyncio.timeout(10):
            while len(numbers) < total:
                await asyncio.sleep(0)
                numbers += _numbers(service)
        assert sorted(numbers) == list(range(total))
        if report.late == 0:
            assert numbers == list(range(total))


async def test_udp_is_let_go_as_fast_as_the_service_reads(cable: Segment, gate: NftGate, hold: NfqueueHold) -> None:
    """What is held is several times what the socket's receive buffer takes."""
    total = 1000
    with (
        closing(await cable.host.call(lambda: _datagram_socket(SERVICE, 9000))) as service,
        closing(await cable.peer.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))) as peer,
    ):
        service.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        for number in range(total):
            peer.sendto(b"%d" % number, (SERVICE, 9000))
        await _until(cable.host, hold, lambda report: report.waiting_packets == total)
        received: list[int] = []
        all_read = asyncio.Event()
        reader = asyncio.get_running_loop()

        def read() -> None:
            received.extend(_numbers(service))
            if len(received) >= total:
                all_read.set()

        reader.add_reader(service.fileno(), read)
        try:
            report = await _release(cable, hold, gate)
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
        closing(await cable.host.call(lambda: _datagram_socket(SERVICE, 9000))) as deaf,
        closing(await cable.host.call(lambda: _datagram_socket(SERVICE, 9001))) as service,
        closing(await cable.peer.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))) as peer,
    ):
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for number in range(100):
            for port in (9000, 9001):
                peer.sendto(b"%d" % number, (SERVICE, port))
        await _until(cable.host, hold, lambda report: report.waiting_packets == 200)
        report = await _release(cable, hold, gate)
        assert (report.released, report.waiting_packets) == (200, 0)
        assert _numbers(service) == list(range(100))
        deaf_got = _numbers(deaf)
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
        report = await _until(cable.host, small, lambda report: report.held_packets == 5)
        assert (report.waiting_packets, report.dropped_udp, report.dropped_other) == (3, 0, 2)
        await _release(cable, small, gate)
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
    await _until(cable.host, hold, lambda report: report.waiting_packets == 2)
    await _release(cable, hold, gate)
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
    await _until(cable.host, hold, lambda report: report.waiting_packets == 2)
    for _ in range(2):
        expected = bytes(_from_peer(address, **of_flow, flags="A"))[14:]
        assert await cable.host.call(lambda: hold.kept([flow])) == [expected]
    assert await cable.host.call(lambda: hold.kept([])) == []
    assert (await _release(cable, hold, gate)).released == 2


async def test_a_queue_has_one_listener(cable: Segment, hold: NfqueueHold) -> None:
    second = NfqueueHold(number=hold.queue)
    with pytest.raises(KernelRefusedError, match="listener"):
        await cable.host.run(second.open())
    assert second.queue is None
    other = NfqueueHold()
    await cable.host.run(other.open())
    assert other.queue not in (None, hold.queue)
    await cable.host.call(other.close)


async def _sent_and_held(cable: Segment, hold: NfqueueHold, peer: socket.socket, number: int) -> None:
    peer.sendto(b"%d" % number, (SERVICE, 9000))
    await _until(cable.host, hold, lambda report: report.waiting_packets == number)


def _delete_table(name: str) -> None:
    """As somebody does who does not ask."""
    with NetlinkSocket(NETLINK_NETFILTER, "test") as netlink:
        netlink.transact(nft.batch([nft.delete_table(nft.INET, name, nft.ACKNOWLEDGE)]))


async def test_the_kernel_throws_out_what_is_queued_when_any_hook_goes(
    cable: Segment, gate: NftGate, hold: NfqueueHold
) -> None:
    """Why a gate is opened with `set` before it is removed, and why it is removed only when nobody queues."""
    other = await cable.host.call(lambda: NftGate("other", [SERVICE]))
    with (
        closing(other),
        closing(await cable.host.call(lambda: _datagram_socket(SERVICE, 9000))) as service,
        closing(await cable.peer.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))) as peer,
    ):
        await other.set(OPEN)
        await _sent_and_held(cable, hold, peer, 1)
        await other.set(CLOSED)
        await other.set(OPEN)
        await _sent_and_held(cable, hold, peer, 2)
        await cable.host.call(lambda: _delete_table("livemove-other"))
        await _sent_and_held(cable, hold, peer, 3)
        report = await _release(cable, hold, gate)
        assert _numbers(service) == [3]
        assert report.kernel_dropped == 2


@pytest.mark.parametrize("by", ["its gate", "its id"])
async def test_another_gate_opens_at_once_and_goes_when_nobody_queues(
    cable: Segment, gate: NftGate, hold: NfqueueHold, by: str
) -> None:
    other = await cable.host.call(lambda: NftGate("other", ["192.0.2.66"]))
    await other.set(CLOSED)
    with (
        closing(other),
        closing(await cable.host.call(lambda: _datagram_socket(SERVICE, 9000))) as service,
        closing(await cable.peer.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))) as peer,
    ):
        await _sent_and_held(cable, hold, peer, 1)
        removal = asyncio.create_task(other.remove() if by == "its gate" else cable.host.run(remove_gate("other")))
        async with asyncio.timeout(5):
            while await other.state() != OPEN:  # noqa: ASYNC110 - the kernel tells nobody
                await asyncio.sleep(0.001)
        await _sent_and_held(cable, hold, peer, 2)
        await gate.set(releasing(hold.queue))
        await _sent_and_held(cable, hold, peer, 3)
        assert not removal.done()
        report = await _release(cable, hold, gate)
        await removal
        assert await other.state() is None
        assert _numbers(service) == [1, 2, 3]
        assert (report.released, report.kernel_dropped) == (3, 0)


async def test_what_criu_left_goes_when_nobody_queues(cable: Segment, gate: NftGate, hold: NfqueueHold) -> None:
    table, chain = nft.new_table(nft.INET, "CRIU-7"), nft.new_base_chain(nft.INET, "CRIU-7", "output", 3, 0)

    def make() -> None:
        with NetlinkSocket(NETLINK_NETFILTER, "test") as netlink:
            netlink.transact(nft.batch([table, chain, nft.new_table(nft.INET, "CRIU-7", nft.ACKNOWLEDGE)]))

    await cable.host.call(make)
    (left,) = [each for each in await cable.host.run(find_leftovers("test")) if each.kind == "criu-table"]
    with (
        closing(await cable.host.call(lambda: _datagram_socket(SERVICE, 9000))) as service,
        closing(await cable.peer.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))) as peer,
    ):
        await _sent_and_held(cable, hold, peer, 1)
        removal = asyncio.create_task(cable.host.run(remove_leftover(left)))
        await asyncio.sleep(0)
        await _sent_and_held(cable, hold, peer, 2)  # asked in the same thread, and so after it
        assert not removal.done()
        await _release(cable, hold, gate)
        await removal
        assert _numbers(service) == [1, 2]
        assert await cable.host.run(find_leftovers("test")) == []


async def test_a_gate_does_not_wait_for_ever_to_be_removed(
    cable: Segment, hold: NfqueueHold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("netfix.hooks.PATIENCE_S", 0)
    other = await cable.host.call(lambda: NftGate("other", ["192.0.2.66"]))
    with closing(other):
        await other.set(CLOSED)
        await other.remove()
        assert await other.state() is None


async def test_who_begins_to_queue_waits_for_a_removal(cable: Segment) -> None:
    one, another = await cable.host.call(Hooks), await cable.host.call(Hooks)
    elsewhere = await cable.peer.call(Hooks)
    with closing(one), closing(another), closing(elsewhere):
        async with one.alone():
            keeping = asyncio.create_task(another.keep())
            await elsewhere.keep()  # another network namespace is none of its business
            assert not keeping.done()
        await keeping
        await one.keep()  # both may


_HOLDER = """
import asyncio, sys
from netfix.gate import NftGate, holding
from netfix.hold import NfqueueHold

async def main():
    hold, gate = NfqueueHold(), NftGate("test", [sys.argv[1]])
    await hold.open()
    await gate.set(holding(hold.queue))
    print(hold.queue, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_when_its_process_is_killed_nothing_passes(cable: Segment) -> None:
    """Neither what was held nor what comes: the rule has no bypass flag."""

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", _HOLDER, SERVICE]
        return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY)

    with (
        closing(await cable.host.call(lambda: _datagram_socket(SERVICE, 9000))) as service,
        closing(await cable.peer.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))) as peer,
        await cable.host.call(start) as holder,
    ):
        assert holder.stdout is not None
        try:
            assert int(await asyncio.to_thread(holder.stdout.readline)) > 0
            peer.sendto(b"1", (SERVICE, 9000))
            await cable.arrived()
        finally:
            holder.send_signal(signal.SIGKILL)
            await asyncio.to_thread(holder.wait)
        peer.sendto(b"2", (SERVICE, 9000))
        await cable.arrived()
        assert _numbers(service) == []
        gate = await cable.host.call(lambda: NftGate("test", [SERVICE]))
        await gate.set(OPEN)
        peer.sendto(b"3", (SERVICE, 9000))
        await cable.arrived()
        assert _numbers(service) == [3]
        await gate.remove()
        gate.close()
