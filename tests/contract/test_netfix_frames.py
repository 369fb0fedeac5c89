"""The contract of `FramePort`, over packet sockets and the fake; and what a Linux neighbour makes of our frames."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from pyroute2 import AsyncIPRoute

from netfix.announce import announcement_frames, probe_frames
from netfix.errors import InvalidAddressError, NetfixError, NoSuchInterfaceError
from netfix.frames import FakeFramePort, FramePort, PacketFramePort, announce
from netfix.questions import question
from tests.contract.netfix_segment import (
    EACH_FAMILY,
    HOST,
    HOST6,
    HOST_MAC,
    NOBODY,
    NOBODY6,
    PEER,
    PEER6,
    PEER_MAC,
    SERVICE,
    SERVICE6,
    Namespace,
    Segment,
)

PATIENCE_S = 0.3


@pytest.fixture(params=["packet", "fake"])
async def port(request: pytest.FixtureRequest, cable: Segment) -> AsyncIterator[FramePort]:
    """The peer's port: the host answers for its addresses."""
    made: FramePort
    if request.param == "packet":
        made = await cable.peer.call(lambda: PacketFramePort("eth0"))
    else:
        made = FakeFramePort({address: {HOST_MAC} for address in (HOST, HOST6, SERVICE, SERVICE6)})
    yield made
    made.close()


async def _who(cable: Segment, port: FramePort, address: str) -> set[str]:
    return await cable.peer.run(port.who(probe_frames(address, PEER_MAC), address, PATIENCE_S))


@EACH_FAMILY
async def test_who_names_the_host_that_has_the_address(cable: Segment, port: FramePort, address: str) -> None:
    assert await _who(cable, port, address) == {HOST_MAC}


@pytest.mark.parametrize("address", [NOBODY, NOBODY6])
async def test_who_names_nobody_where_nobody_answers(cable: Segment, port: FramePort, address: str) -> None:
    assert await _who(cable, port, address) == set()


@EACH_FAMILY
async def test_who_need_not_listen_to_the_end_once_somebody_has_answered(
    cable: Segment, port: FramePort, address: str
) -> None:
    asking = port.who(probe_frames(address, PEER_MAC), address, 3600, settle_s=0.05)
    assert await asyncio.wait_for(cable.peer.run(asking), 60) == {HOST_MAC}


@EACH_FAMILY
async def test_a_neighbour_that_is_asked_in_the_name_of_an_address_acknowledges(
    cable: Segment, port: FramePort, address: str
) -> None:
    """The host is the neighbour here; the peer asks as if it had another service address."""
    host, claimed = (HOST6, NOBODY6) if ":" in address else (HOST, NOBODY)
    questions = {host: question(claimed, PEER_MAC, host)}
    assert await cable.peer.run(port.ask(questions, claimed, PATIENCE_S)) == {host}
    assert await cable.peer.run(port.ask({}, claimed, PATIENCE_S)) == set()


@EACH_FAMILY
async def test_a_port_keeps_the_namespace_that_it_was_made_in(cable: Segment, address: str) -> None:
    """Here it is asked from outside."""
    port = await cable.peer.call(lambda: PacketFramePort("eth0"))
    host, claimed = (HOST6, NOBODY6) if ":" in address else (HOST, NOBODY)
    assert await port.who(probe_frames(address, PEER_MAC), address, PATIENCE_S) == {HOST_MAC}
    assert await port.ask({host: question(claimed, PEER_MAC, host)}, claimed, PATIENCE_S) == {host}
    port.close()
    port.close()


@EACH_FAMILY
async def test_a_neighbour_that_does_not_answer_has_not_acknowledged(cable: Segment, address: str) -> None:
    silent, claimed = (NOBODY6, "2001:db8::78") if ":" in address else (NOBODY, "192.0.2.78")
    questions = {silent: question(claimed, PEER_MAC, silent)}
    packet = await cable.peer.call(lambda: PacketFramePort("eth0"))
    ports: list[FramePort] = [packet, FakeFramePort(deaf={silent})]
    for port in ports:
        assert await cable.peer.run(port.ask(questions, claimed, PATIENCE_S)) == set()
        port.close()


async def test_who_wants_an_address(cable: Segment, port: FramePort) -> None:
    with pytest.raises(InvalidAddressError):
        await cable.peer.run(port.who([], "nobody", PATIENCE_S))


async def test_closing_is_idempotent(port: FramePort) -> None:
    port.close()
    port.close()


async def test_an_unknown_interface_is_an_error() -> None:
    with Namespace() as namespace:
        with pytest.raises(NoSuchInterfaceError, match="eth7"):
            await namespace.call(lambda: PacketFramePort("eth7"))
        port = await namespace.call(lambda: PacketFramePort("lo"))
        try:
            with pytest.raises(NetfixError, match="sending on lo"):
                await port.send([bytes(60)])  # lo is down
        finally:
            port.close()


async def _neighbour(address: str) -> str:
    async with AsyncIPRoute() as route:
        entries = [entry async for entry in await route.neigh("dump")]
    (entry,) = [entry for entry in entries if entry.get_attr("NDA_DST") == address]
    return str(entry.get_attr("NDA_LLADDR"))


async def _make_stale(address: str) -> None:
    """What the peer had learnt of the address before: an ordinary entry, elsewhere."""
    async with AsyncIPRoute() as route:
        (index,) = await route.link_lookup(ifname="eth0")
        await route.neigh("replace", dst=address, lladdr="02:00:00:00:00:77", ifindex=index, state=0x04)


@EACH_FAMILY
async def test_a_neighbour_follows_an_announcement_at_once(cable: Segment, address: str) -> None:
    port = await cable.host.call(lambda: PacketFramePort("eth0"))
    try:
        await cable.peer.run(_make_stale(address))
        await announce(port, announcement_frames(address, HOST_MAC), burst=1, repeats=0)
        await cable.arrived()
        assert await cable.peer.run(_neighbour(address)) == HOST_MAC
    finally:
        port.close()


@EACH_FAMILY
async def test_a_neighbour_that_acknowledges_has_learnt_where_the_address_is(cable: Segment, address: str) -> None:
    """What is asked in the name of the address is as good as an announcement, and is answered."""
    asked = PEER6 if ":" in address else PEER
    port = await cable.host.call(lambda: PacketFramePort("eth0"))
    try:
        await cable.peer.run(_make_stale(address))
        questions = {asked: question(address, HOST_MAC, asked)}
        assert await cable.host.run(port.ask(questions, address, PATIENCE_S)) == {asked}
        assert await cable.peer.run(_neighbour(address)) == HOST_MAC
    finally:
        port.close()


@EACH_FAMILY
async def test_a_probe_teaches_a_neighbour_nothing(cable: Segment, address: str) -> None:
    port = await cable.host.call(lambda: PacketFramePort("eth0"))
    try:
        await cable.peer.run(_make_stale(address))
        await port.send(probe_frames(address, HOST_MAC))
        await cable.arrived()
        assert await cable.peer.run(_neighbour(address)) == "02:00:00:00:00:77"
    finally:
        port.close()
