"""The contract of `SocketInventory`, over sock_diag and the fake; leftovers as nf_tables lists them."""

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from netfix import nft
from netfix.gate import CLOSED, NftGate
from netfix.leftovers import FakeLeftoverFinder, LeftoverFinder, NftLeftoverFinder, find_leftovers
from netfix.netlink import NETLINK_NETFILTER, NetlinkSocket
from netfix.sockets import (
    DiagSocketInventory,
    FakeSocketInventory,
    SocketInventory,
    SocketRecord,
    difference,
    of_addresses,
    owned_by,
    socket_inodes,
)
from tests.contract.netfix_segment import SERVICE, SERVICE6, Segment


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=["diag", "fake"])
async def inventory(request: pytest.FixtureRequest, cable: Segment) -> AsyncIterator[SocketInventory]:
    made: SocketInventory
    made = await cable.host.call(DiagSocketInventory) if request.param == "diag" else FakeSocketInventory()
    yield made
    made.close()


async def test_an_idle_host_has_no_sockets(inventory: SocketInventory) -> None:
    assert await inventory.sockets() == []
    inventory.close()
    inventory.close()


async def _service(
    cable: Segment, opened: ExitStack, address: str
) -> tuple[socket.socket, socket.socket, socket.socket]:
    """A listener on the host, a client at the peer, and the host's end of their connection."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = opened.enter_context(
        await cable.host.call(
            lambda: socket.create_server((address, 0), family=family, backlog=7, dualstack_ipv6=address == "::")
        )
    )
    where = (SERVICE if address == "::" else address, listener.getsockname()[1])
    client = opened.enter_context(await cable.peer.call(lambda: socket.create_connection(where, timeout=5)))
    return listener, client, opened.enter_context(listener.accept()[0])


async def _inventory(cable: Segment) -> list[SocketRecord]:
    inventory = await cable.host.call(DiagSocketInventory)
    try:
        return await inventory.sockets()
    finally:
        inventory.close()


@pytest.mark.parametrize("address", [SERVICE, SERVICE6])
async def test_listening_and_connected_sockets(cable: Segment, opened: ExitStack, address: str) -> None:
    listener, client, service = await _service(cable, opened, address)
    client.sendall(b"12345")
    assert service.recv(5, socket.MSG_PEEK | socket.MSG_WAITALL) == b"12345"
    found = {record.state: record for record in await _inventory(cable)}
    assert set(found) == {"LISTEN", "ESTABLISHED"}
    listening, established = found["LISTEN"], found["ESTABLISHED"]
    assert (listening.local, listening.local_port) == listener.getsockname()[:2]
    assert (listening.receive_queue_bytes, listening.send_queue_bytes) == (0, 7)
    assert (established.remote, established.remote_port) == client.getsockname()[:2]
    assert (established.receive_queue_bytes, established.send_queue_bytes) == (5, 0)
    assert (established.family, established.mapped) == ("ipv6" if ":" in address else "ipv4", False)
    inodes = {os.fstat(one.fileno()).st_ino for one in (listener, service)}
    assert {listening.inode, established.inode} == inodes
    assert inodes <= socket_inodes([os.getpid()])
    assert len(owned_by(found.values(), inodes)) == 2


async def test_an_ipv4_connection_of_an_ipv6_socket_is_an_ipv4_connection(cable: Segment, opened: ExitStack) -> None:
    def serve() -> socket.socket:
        return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)

    listener = opened.enter_context(await cable.host.call(serve))
    where = (SERVICE, listener.getsockname()[1])
    opened.enter_context(await cable.peer.call(lambda: socket.create_connection(where, timeout=5)))
    opened.enter_context(listener.accept()[0])
    records = await _inventory(cable)
    (connected,) = of_addresses(records, [SERVICE])
    assert (connected.family, connected.local, connected.mapped) == ("ipv4", SERVICE, True)
    assert len(of_addresses(records, [SERVICE], wildcard=True)) == 2


async def test_a_listener_for_ipv6_only_is_not_on_an_ipv4_address(cable: Segment, opened: ExitStack) -> None:
    opened.enter_context(await cable.host.call(lambda: socket.create_server(("::", 0), family=socket.AF_INET6)))
    records = await _inventory(cable)
    assert records[0].v6only
    assert of_addresses(records, [SERVICE], wildcard=True) == []
    assert of_addresses(records, [SERVICE6], wildcard=True) == records


async def test_udp_bound_and_connected(cable: Segment, opened: ExitStack) -> None:
    def bind(connect: bool) -> socket.socket:
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        one.bind((SERVICE, 0))
        if connect:
            one.connect(("192.0.2.1", 9))
        return one

    for connect in (False, True):
        opened.enter_context(await cable.host.call(lambda connect=connect: bind(connect)))  # type: ignore[misc]
    states = {record.state for record in await _inventory(cable) if record.protocol == "udp"}
    assert states == {"UNCONNECTED", "ESTABLISHED"}


async def test_a_lost_connection_is_the_difference(cable: Segment, opened: ExitStack) -> None:
    _, client, service = await _service(cable, opened, SERVICE)
    before = await _inventory(cable)
    client.shutdown(socket.SHUT_WR)
    assert service.recv(1) == b""
    assert difference(before, await _inventory(cable)) == ((), ()), "closed by the peer is not lost"
    service.close()
    client.close()
    lost, new = difference(before, await _inventory(cable))
    assert [record.state for record in lost] in (["ESTABLISHED"], []), "LAST_ACK is a connection still"
    assert new == ()


def _criu_lock() -> None:
    """What `criu dump --network-lock nftables`, and its iptables lock, leave."""
    mark = nft.meta_is(3, (0xC114).to_bytes(4, "little"))
    with NetlinkSocket(NETLINK_NETFILTER, "test") as netlink:
        netlink.transact(
            nft.batch(
                [
                    nft.new_table(nft.INET, "CRIU-4711"),
                    nft.new_base_chain(nft.INET, "CRIU-4711", "input", 1, 0),
                    nft.new_table(nft.IPV4, "filter"),
                    nft.new_base_chain(nft.IPV4, "filter", "INPUT", 1, 0),
                    nft.new_base_chain(nft.IPV4, "filter", "CRIU", 1, 0),
                    nft.new_rule(nft.IPV4, "filter", "INPUT", [*mark, *nft.verdict(nft.DROP)], ""),
                    nft.new_table(nft.INET, "CRIU-4711", nft.ACKNOWLEDGE),
                ]
            )
        )


@pytest.mark.parametrize("kind", ["nft", "fake"])
async def test_leftovers_are_named_and_our_own_gate_is_not(cable: Segment, kind: str) -> None:
    gate = await cable.host.call(lambda: NftGate("mine", [SERVICE]))
    finder: LeftoverFinder = NftLeftoverFinder()
    try:
        assert await cable.host.run(find_leftovers()) == []
        await gate.set(CLOSED)
        await cable.host.call(_criu_lock)
        if kind == "fake":
            finder = FakeLeftoverFinder(await cable.host.run(find_leftovers()))
        found = await cable.host.run(finder.find("mine"))
        assert sorted((one.kind, one.family, one.table, one.chain) for one in found) == [
            ("criu-chain", "ip", "filter", "CRIU"),
            ("criu-rule", "ip", "filter", "INPUT"),
            ("criu-table", "inet", "CRIU-4711", ""),
        ]
        gates = [one for one in await cable.host.run(finder.find()) if one.kind == "gate"]
        assert {(one.family, one.table) for one in gates} == {("inet", "livemove-mine"), ("arp", "livemove-mine")}
    finally:
        gate.close()


@pytest.mark.skipif(not shutil.which("nft"), reason="compares with the nft binary")
async def test_the_hint_for_a_table_removes_it(cable: Segment) -> None:
    await cable.host.call(_criu_lock)
    (table,) = [one for one in await cable.host.run(find_leftovers()) if one.kind == "criu-table"]
    await cable.host.call(lambda: subprocess.run(table.hint.split(), check=True))
    assert [one for one in await cable.host.run(find_leftovers()) if one.kind == "criu-table"] == []


@pytest.fixture(params=["diag", "fake"])
async def pending(request: pytest.FixtureRequest, cable: Segment) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """What is pending on the service's two addresses, by sock_diag, or by the fake over all that sock_diag has."""
    inventory = await cable.host.call(DiagSocketInventory)

    async def look() -> list[SocketRecord]:
        reader = inventory if request.param == "diag" else FakeSocketInventory(await inventory.sockets())
        return await reader.pending([SERVICE, SERVICE6])

    yield look
    inventory.close()


Pending = Callable[[], Awaitable[list[SocketRecord]]]


@pytest.mark.parametrize("address", [SERVICE, SERVICE6, "::"])
async def test_what_waits_in_tcp_sockets(cable: Segment, opened: ExitStack, pending: Pending, address: str) -> None:
    listener, client, service = await _service(cable, opened, address)
    assert await pending() == []
    client.sendall(b"12345")
    where = (SERVICE if address == "::" else address, listener.getsockname()[1])
    for _ in range(2):
        opened.enter_context(await cable.peer.call(lambda: socket.create_connection(where, timeout=5)))
    assert service.recv(5, socket.MSG_PEEK | socket.MSG_WAITALL) == b"12345"
    found = {record.state: record for record in await pending()}
    assert set(found) == {"LISTEN", "ESTABLISHED"}
    assert (found["LISTEN"].receive_queue_bytes, found["ESTABLISHED"].receive_queue_bytes) == (2, 5)
    assert found["ESTABLISHED"].inode == os.fstat(service.fileno()).st_ino
    assert found["ESTABLISHED"].local == where[0]
    service.recv(5)
    for _ in range(2):
        opened.enter_context(listener.accept()[0])
    assert await pending() == []


@pytest.mark.parametrize("address", [SERVICE, SERVICE6, "0.0.0.0", "::"])
async def test_what_waits_in_udp_sockets(cable: Segment, opened: ExitStack, pending: Pending, address: str) -> None:
    def make() -> socket.socket:
        return socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)

    service = opened.enter_context(await cable.host.call(make))
    service.bind((address, 0))
    client = opened.enter_context(await cable.peer.call(make))
    target = {"0.0.0.0": SERVICE, "::": SERVICE6}.get(address, address)
    client.sendto(b"12345", (target, service.getsockname()[1]))
    assert service.recv(5, socket.MSG_PEEK) == b"12345"
    (record,) = await pending()
    assert (record.protocol, record.local, record.inode) == ("udp", address, os.fstat(service.fileno()).st_ino)
    assert record.receive_queue_bytes > 0
    service.recv(5)
    assert await pending() == []


async def test_what_waits_on_another_address_is_not_ours(cable: Segment, opened: ExitStack, pending: Pending) -> None:
    service = opened.enter_context(await cable.host.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
    service.bind(("127.0.0.1", 0))
    service.sendto(b"12345", service.getsockname())
    assert service.recv(5, socket.MSG_PEEK) == b"12345"
    assert await pending() == []


async def test_the_last_words_of_a_closed_connection(cable: Segment, opened: ExitStack, pending: Pending) -> None:
    """The peer does not read: what its buffer cannot take stays here, and belongs to nobody when it is closed."""
    _, client, service = await _service(cable, opened, SERVICE)
    service.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += service.send(bytes(65536))
    assert await pending() == [], "the service still has it"
    service.close()
    (record,) = await pending()
    assert (record.state, record.inode) == ("FIN_WAIT1", 0)
    assert 0 < record.unsent_bytes <= record.send_queue_bytes <= sent + 1
    client.settimeout(10)
    while data := client.recv(1 << 20):
        sent -= len(data)
    assert sent == 0
    assert await pending() == []
