"""The contract of `Delivery`, over a real host and the fake; and a handshake whose last packet came elsewhere."""

import asyncio
import socket
from contextlib import closing
from pathlib import Path

import pytest
from pyroute2 import AsyncIPRoute
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from netfix.delivery import Delivery, FakeDelivery, LoopbackDelivery
from netfix.gate import SILENT, NftGate
from tests.contract.netfix_segment import (
    EACH_FAMILY,
    HOST_MAC,
    NOBODY,
    NOBODY6,
    PEER_MAC,
    SERVICE,
    SERVICE6,
    Segment,
)

PORT = 40000


@pytest.fixture(params=["fake", "real"])
async def delivery(request: pytest.FixtureRequest, cable: Segment) -> Delivery:
    if request.param == "fake":
        return FakeDelivery()
    return await cable.host.call(LoopbackDelivery)


def _from_nobody(address: str, port: int, flags: str, sequence: int, acknowledged: int = 0) -> Packet:
    """A segment of a client that has no kernel of its own."""
    ip = IPv6(src=NOBODY6, dst=address) if ":" in address else IP(src=NOBODY, dst=address)
    return ip / TCP(sport=PORT, dport=port, flags=flags, seq=sequence, ack=acknowledged)


async def _meet_nobody() -> None:
    async with AsyncIPRoute() as route:
        (index,) = await route.link_lookup(ifname="eth0")
        for address in (NOBODY, NOBODY6):
            await route.neigh("replace", dst=address, lladdr=PEER_MAC, ifindex=index, state=0x80)


async def test_what_is_of_no_use_is_lost_and_closing_may_be_repeated(cable: Segment, delivery: Delivery) -> None:
    await cable.host.run(delivery.deliver([]))
    packets = [bytes(_from_nobody(address, 9, "A", 5, 6)) for address in (SERVICE, "127.0.0.1", SERVICE6)]
    await cable.host.run(delivery.deliver(packets))
    delivery.close()
    delivery.close()


@EACH_FAMILY
async def test_a_handshake_is_finished_by_a_packet_that_came_elsewhere(cable: Segment, address: str) -> None:
    """Behind a silent gate, and with the strictest filter for the way that packets come."""
    await cable.host.run(_meet_nobody())
    for name in ("all", "lo", "eth0"):
        await cable.host.call(lambda name=name: _filter_strictly(name))  # type: ignore[misc]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    gate = await cable.host.call(lambda: NftGate("test", [SERVICE, SERVICE6]))
    delivery = await cable.host.call(LoopbackDelivery)
    with (
        closing(gate),
        closing(delivery),
        await cable.host.call(lambda: socket.create_server((address, 0), family=family)) as listener,
    ):
        listener.setblocking(False)
        port = listener.getsockname()[1]
        await cable.transmit(bytes(Ether(src=PEER_MAC, dst=HOST_MAC) / _from_nobody(address, port, "S", 1000)))
        (answer,) = [frame for frame in await cable.arrived() if TCP in frame]
        assert str(answer[TCP].flags) == "SA"
        with pytest.raises(BlockingIOError):
            listener.accept()
        await gate.set(SILENT)
        last = bytes(_from_nobody(address, port, "A", 1001, answer[TCP].seq + 1))
        await cable.host.run(delivery.deliver([last]))
        async with asyncio.timeout(10):
            service, where = await asyncio.get_running_loop().sock_accept(listener)
        service.close()
        assert where[:2] == (NOBODY6 if ":" in address else NOBODY, PORT)


def _filter_strictly(name: str) -> None:
    Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").write_text("1")
