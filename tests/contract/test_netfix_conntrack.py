"""The contract of `ConnectionTable`, over ctnetlink and the fake; and what its entries are worth to a firewall."""

import asyncio
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from netfix.conntrack import ConnectionTable, FakeConnectionTable, NetlinkConnectionTable
from netfix.conntrack_entry import (
    ASSURED,
    CONFIRMED,
    DST_NAT,
    ESTABLISHED,
    LIBERAL,
    SEEN_REPLY,
    SRC_NAT,
    TCP,
    TIME_WAIT,
    UDP,
    Connection,
    Flow,
    TcpInfo,
    as_created,
    untracked,
)
from netfix.errors import InvalidAddressError, NetfixError
from netfix.sockets import DiagSocketInventory
from tests.contract.netfix_segment import PEER, PEER6, SERVICE, SERVICE6, Namespace, Segment

BOTH_WAYS = CONFIRMED | SEEN_REPLY | ASSURED


def inward(port: int, peer: str = PEER, service: str = SERVICE) -> Connection:
    flow = Flow(peer, port, service, 7000)
    return Connection(TCP, flow, flow.reversed, BOTH_WAYS, 1000, 7, tcp=TcpInfo(ESTABLISHED, 7, 9, 3, 3))


OUTWARD = replace(inward(1), original=Flow(SERVICE, 5, PEER, 80), reply=Flow(PEER, 80, SERVICE, 5))
DATAGRAMS = replace(inward(2), protocol=UDP, tcp=None, status=CONFIRMED, timeout_s=500, mark=0)
TO_PORT_80 = replace(inward(3), original=Flow(PEER, 3, SERVICE, 80), status=BOTH_WAYS | DST_NAT)
TO_ANOTHER = replace(inward(4), original=Flow(PEER, 4, "203.0.113.1", 80), status=BOTH_WAYS | DST_NAT)
FROM_ANOTHER = replace(
    OUTWARD, original=Flow("10.0.0.1", 5, PEER, 81), reply=Flow(PEER, 81, SERVICE, 6), status=BOTH_WAYS | SRC_NAT
)
ZONED = replace(inward(1), zone=3)
EVERY_KIND = [inward(1), OUTWARD, DATAGRAMS, TO_PORT_80, TO_ANOTHER, FROM_ANOTHER, ZONED]


@pytest.fixture
def host() -> Iterator[Namespace]:
    with Namespace() as namespace:
        yield namespace


@pytest.fixture(params=["ctnetlink", "fake"])
async def table(request: pytest.FixtureRequest, host: Namespace) -> AsyncIterator[ConnectionTable]:
    made: ConnectionTable
    made = await host.call(NetlinkConnectionTable) if request.param == "ctnetlink" else FakeConnectionTable()
    yield made
    made.close()
    made.close()


def comparable(connections: list[Connection]) -> set[Connection]:
    """Without what the kernel adds: a second is lost here and there, and it notes how far translation has come."""
    return {replace(each, timeout_s=round(each.timeout_s, -2), status=each.status & 0x3F) for each in connections}


async def test_every_kind_is_made_as_it_was_read_and_goes_again(table: ConnectionTable) -> None:
    await table.create(EVERY_KIND)
    made = await table.connections([SERVICE])
    assert comparable(made) == {as_created(each) for each in EVERY_KIND}
    assert all(each.tcp is None or each.tcp.flags_original & LIBERAL for each in made)
    assert await table.tracks()
    await table.remove([SERVICE])
    await table.remove([SERVICE])
    assert await table.connections([SERVICE]) == []


async def test_only_what_names_an_address_is_seen_and_removed(table: ConnectionTable) -> None:
    other, six = inward(1, service="192.0.2.11"), inward(1, PEER6, SERVICE6)
    await table.create([inward(1), other, six])
    assert len(await table.connections([SERVICE, SERVICE6])) == 2
    assert await table.connections(["192.0.2.77"]) == []
    await table.remove([SERVICE, "2001:DB8::10"])
    assert await table.connections([SERVICE, SERVICE6]) == []
    assert len(await table.connections(["192.0.2.11"])) == 1


async def test_some_are_spared(table: ConnectionTable) -> None:
    await table.create([inward(1), inward(1, peer="192.0.2.99")])
    await table.remove([SERVICE], spare=["192.0.2.99"])
    (left,) = await table.connections([SERVICE])
    assert left.original.source == "192.0.2.99"


async def test_what_is_there_is_brought_up_to_date(table: ConnectionTable) -> None:
    """An earlier stay of the service may have left an entry, which knows other windows."""
    await table.create([replace(inward(1), mark=1), TO_PORT_80])
    await table.create([inward(1), inward(2), TO_PORT_80])
    marks = {each.original.source_port: each.mark for each in await table.connections([SERVICE])}
    assert marks == {1: 7, 2: 7, 3: 7}


async def test_what_is_over_is_removed_and_not_told(table: ConnectionTable) -> None:
    await table.create([replace(inward(1), tcp=TcpInfo(TIME_WAIT))])
    assert await table.connections([SERVICE]) == []
    await table.remove([SERVICE])
    await table.create([])


async def test_bad_addresses_are_refused(table: ConnectionTable) -> None:
    for call in (table.connections, table.remove):
        with pytest.raises(InvalidAddressError):
            await call(["nonsense"])


async def test_more_than_fits_into_one_send(table: ConnectionTable) -> None:
    many = [inward(port) for port in range(1, 1001)]
    await table.create(many)
    await table.create(many)
    assert len(await table.connections([SERVICE])) == 1000
    await table.remove([SERVICE])
    assert await table.connections([SERVICE]) == []


async def test_a_host_that_tracks_nothing_has_nothing(host: Namespace) -> None:
    table = await host.call(NetlinkConnectionTable)
    with closing(table):
        assert not await table.tracks()
        assert await table.connections([SERVICE, SERVICE6]) == []


async def test_what_the_kernel_refuses_is_an_error(host: Namespace) -> None:
    table = await host.call(NetlinkConnectionTable)
    with closing(table):
        with pytest.raises(NetfixError, match="connection tracking"):
            await table.create([inward(1), replace(inward(2), tcp=TcpInfo(99))])
        assert len(await table.connections([SERVICE])) == 1


# --- with a firewall that lets in new connections to the port and established ones, and drops what is invalid --------

STRICT = """
table inet strict {
    counter refused { }
    chain input {
        type filter hook input priority 0; policy drop;
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
        ct state established,related accept
        tcp dport 7000 tcp flags & (syn | ack | rst) == syn ct state new accept
        udp dport 7000 ct state new accept
        counter name refused
    }
    chain answers { type filter hook output priority 0; policy accept; ct state invalid drop; }
    chain translate { type nat hook prerouting priority -100; tcp dport 80 dnat ip to 192.0.2.10:7000; }
}
"""


@pytest.fixture
async def cable(cable: Segment) -> Segment:
    await cable.host.call(lambda: subprocess.run(["nft", "-f", "-"], input=STRICT, text=True, check=True))
    loose = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_loose")
    await cable.host.call(lambda: loose.write_text("0"))
    return cable


async def refused(cable: Segment) -> int:
    """How many packets the firewall has dropped."""

    def ask() -> int:
        command = ["nft", "list", "counter", "inet", "strict", "refused"]
        words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return int(words[words.index("packets") + 1])

    return await cable.host.call(ask)


async def until(condition: Callable[[int], bool], cable: Segment) -> None:
    async with asyncio.timeout(20):
        while not condition(await refused(cable)):  # noqa: ASYNC110 - nobody tells when a counter changes
            await asyncio.sleep(0.02)


async def hears(receiver: socket.socket, size: int) -> bytes:
    receiver.setblocking(False)
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(receiver, size), 20)


@pytest.mark.parametrize(
    ("address", "port", "known_from"),
    [
        (SERVICE, 7000, "table"),
        (SERVICE6, 7000, "table"),
        (SERVICE, 80, "table"),  # translated: nobody but the table knows how
        (SERVICE, 7000, "sockets"),
        (SERVICE6, 7000, "sockets"),
    ],
)
async def test_a_connection_that_a_strict_firewall_refuses_goes_on_with_its_entry(
    cable: Segment, address: str, port: int, known_from: str
) -> None:
    """The host forgets the connection, and so is what a destination is to one that comes from elsewhere."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = await cable.host.call(lambda: socket.create_server((address, 7000), family=family))
    client = await cable.peer.call(lambda: socket.create_connection((address, port), timeout=10))
    table = await cable.host.call(NetlinkConnectionTable)
    inventory = await cable.host.call(DiagSocketInventory)
    with closing(listener), closing(client), closing(table), closing(inventory), listener.accept()[0] as service:
        client.sendall(b"one")
        assert await hears(service, 9) == b"one"
        known = await table.connections([address])
        if known_from == "sockets":
            known = untracked(await inventory.sockets(), [address], [])
        assert len(known) == 1
        before = await refused(cable)
        await table.remove([address])
        client.sendall(b"two")
        await until(lambda count: count > before, cable)
        assert await table.connections([address]) == [], "the firewall takes it for invalid, and does not track it"
        await table.create(known)
        assert await hears(service, 9) == b"two", "sent again by the client's kernel"
        service.sendall(b"three")
        assert await hears(client, 9) == b"three"


async def test_datagrams_come_back_in_to_a_service_that_has_asked(cable: Segment) -> None:
    def bound(address: str, port: int) -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind((address, port))
        return made

    service = await cable.host.call(lambda: bound(SERVICE, 9000))
    peer = await cable.peer.call(lambda: bound(PEER, 5300))
    table = await cable.host.call(NetlinkConnectionTable)
    with closing(service), closing(peer), closing(table):
        service.sendto(b"?", (PEER, 5300))
        assert await hears(peer, 9) == b"?"
        known = await table.connections([SERVICE])
        assert [each.protocol for each in known] == [UDP]
        before = await refused(cable)
        await table.remove([SERVICE])
        peer.sendto(b"lost", (SERVICE, 9000))
        await until(lambda count: count > before, cable)
        await table.create(known)
        peer.sendto(b"!", (SERVICE, 9000))
        assert await hears(service, 9) == b"!"
