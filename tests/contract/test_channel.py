"""One suite for the channel between the agents: the fake, and the real one over TLS on the loopback."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Protocol

import pytest

from coordinator.agent import channel
from coordinator.agent.assembly import AnyListener
from coordinator.agent.channel import Channel, expect
from coordinator.agent.fakes.channel import FakeSegment
from coordinator.agent.messages import Divert, Diverted, GiveUp, Go, ImageChunk, ImagesComplete, Staged
from coordinator.credentials import mint
from coordinator.errors import ChannelFailed, LivemoveError, PeerAborted, ProtocolError, RestoreFailed
from coordinator.protocol import Credentials

ID = "m-1"
PATIENCE_S = 20.0
FOR_SOURCE, FOR_DESTINATION = mint(ID)
STRANGER, _ = mint(ID)


class Network(Protocol):
    """Where channels are made."""

    async def listen(self, credentials: Credentials) -> AnyListener:
        """The destination's end."""

    async def connect(self, port: int, credentials: Credentials, migration: str) -> Channel:
        """The source's end."""


class Loopback:
    """The real one."""

    async def listen(self, credentials: Credentials) -> AnyListener:
        return await channel.Listener.open("127.0.0.1", credentials, ID)

    async def connect(self, port: int, credentials: Credentials, migration: str) -> Channel:
        return await channel.connect("127.0.0.1", port, credentials, migration, PATIENCE_S)


class Memory:
    """The fake one."""

    def __init__(self) -> None:
        self._segment = FakeSegment()

    async def listen(self, credentials: Credentials) -> AnyListener:
        return await self._segment.listen(credentials, ID)

    async def connect(self, port: int, credentials: Credentials, migration: str) -> Channel:
        return await self._segment.connect(port, credentials, migration)


@pytest.fixture(params=[Loopback, Memory])
def network(request: pytest.FixtureRequest) -> Network:
    made: Network = request.param()
    return made


@asynccontextmanager
async def listening(network: Network, credentials: Credentials = FOR_DESTINATION) -> AsyncIterator[AnyListener]:
    listener = await network.listen(credentials)
    try:
        yield listener
    finally:
        await listener.close()
        await listener.close()


@asynccontextmanager
async def linked(network: Network) -> AsyncIterator[tuple[Channel, Channel]]:
    """Both ends: the source's, the destination's."""
    async with listening(network) as listener:
        source = await network.connect(listener.port, FOR_SOURCE, ID)
        destination = await listener.accept(PATIENCE_S)
    try:
        yield source, destination
    finally:
        for end in (source, destination):
            await end.close()


async def test_messages_arrive_in_order_with_their_payloads(network: Network) -> None:
    async with linked(network) as (source, destination):
        await source.send(Divert())
        for number in range(100):
            await source.send(ImageChunk(name="pages-1.img", offset=number), bytes([number]) * number)
        await source.send(ImagesComplete(sizes={"pages-1.img": 7}, pages_later=False))
        assert await destination.receive() == (Divert(), b"")
        for number in range(100):
            message = ImageChunk(name="pages-1.img", offset=number)
            assert await destination.receive() == (message, bytes([number]) * number)
        assert await destination.receive() == (ImagesComplete(sizes={"pages-1.img": 7}, pages_later=False), b"")


async def test_both_ways_at_once(network: Network) -> None:
    async with linked(network) as (source, destination):
        waiting = asyncio.ensure_future(expect(source, Diverted))
        await source.send(Divert())
        await expect(destination, Divert)
        await destination.send(Diverted())
        assert await waiting == Diverted()


async def test_a_large_payload(network: Network) -> None:
    payload = bytes(range(256)) * (5 * 1024 * 4)
    async with linked(network) as (source, destination):
        sending = asyncio.ensure_future(source.send(ImageChunk(name="p", offset=0), payload))
        message, found = await destination.receive()
        await sending
    assert message == ImageChunk(name="p", offset=0)
    assert found == payload


async def test_what_was_sent_before_a_close_arrives_and_then_the_close_is_seen(network: Network) -> None:
    async with linked(network) as (source, destination):
        await source.send(Go())
        await source.close()
        await source.close()
        assert await destination.receive() == (Go(), b"")
        for _ in range(2):
            with pytest.raises(ChannelFailed):
                await destination.receive()


async def test_a_wait_ends_when_the_other_side_closes(network: Network) -> None:
    async with linked(network) as (source, destination):
        waiting = asyncio.ensure_future(source.receive())
        await destination.close()
        with pytest.raises(ChannelFailed):
            await waiting


async def test_a_wait_can_be_given_up_and_nothing_is_lost(network: Network) -> None:
    async with linked(network) as (source, destination):
        waiting = asyncio.ensure_future(source.receive())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await destination.send(Staged())
        assert await expect(source, Staged) == Staged()


async def test_expect(network: Network) -> None:
    async with linked(network) as (source, destination):
        await destination.send(Diverted())
        with pytest.raises(ProtocolError, match="sent Diverted where Staged was due"):
            await expect(source, Staged)
        await destination.send(GiveUp(error=RestoreFailed("no such file", "copy it").to_wire()))
        with pytest.raises(PeerAborted, match="RESTORE_FAILED: no such file") as caught:
            await expect(source, Staged)
        assert caught.value.hint == "copy it"


async def talk(network: Network, port: int, credentials: Credentials, migration: str = ID) -> None:
    """Connect and hear something: with TLS 1.3 a client learns of its refusal when it first reads."""
    link = await network.connect(port, credentials, migration)
    try:
        await link.receive()
    finally:
        await link.close()


async def test_a_peer_with_another_certificate_is_refused_and_the_right_one_still_comes_in(network: Network) -> None:
    async with listening(network) as listener:
        with pytest.raises(ChannelFailed):
            await talk(network, listener.port, replace(STRANGER, peer_certificate=FOR_DESTINATION.certificate))
        link = await network.connect(listener.port, FOR_SOURCE, ID)
        await (await listener.accept(PATIENCE_S)).close()
        await link.close()


async def test_a_listener_with_another_certificate_is_refused(network: Network) -> None:
    impostor = replace(STRANGER, peer_certificate=FOR_SOURCE.certificate)
    async with listening(network, impostor) as listener:
        with pytest.raises(ChannelFailed):
            await talk(network, listener.port, FOR_SOURCE)


async def test_a_peer_of_another_migration_is_refused(network: Network) -> None:
    async with listening(network) as listener:
        with pytest.raises(LivemoveError):
            await talk(network, listener.port, FOR_SOURCE, "m-2")
        with pytest.raises(ChannelFailed, match="did not connect"):
            await listener.accept(0)


async def test_a_second_peer_is_refused(network: Network) -> None:
    async with listening(network) as listener:
        first = await network.connect(listener.port, FOR_SOURCE, ID)
        accepted = await listener.accept(PATIENCE_S)
        with pytest.raises(ChannelFailed):
            await talk(network, listener.port, FOR_SOURCE)
        await first.send(Divert())
        assert await accepted.receive() == (Divert(), b"")
        for end in (first, accepted):
            await end.close()


async def test_nobody_listens(network: Network) -> None:
    async with listening(network) as listener:
        port = listener.port
    with pytest.raises(ChannelFailed, match=str(port)):
        await network.connect(port, FOR_SOURCE, ID)


def _client(credentials: Credentials) -> ssl.SSLContext:
    """A client that accepts any server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_verify_locations(cadata=credentials.peer_certificate.decode())
    return context


async def test_a_channel_that_nobody_took_is_closed_with_its_listener(network: Network) -> None:
    async with listening(network) as listener:
        link = await network.connect(listener.port, FOR_SOURCE, ID)
    with pytest.raises(ChannelFailed):
        await link.receive()
    await link.close()


async def test_real_only_a_peer_without_tls_1_3_is_refused() -> None:
    context = _client(FOR_SOURCE)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with listening(Loopback()) as listener:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", listener.port, ssl=context)
        with pytest.raises(ChannelFailed, match="did not connect"):
            await listener.accept(0)
    async with linked(Loopback()) as (source, _):
        assert isinstance(source, channel.TlsChannel)
        assert source._writer.get_extra_info("ssl_object").version() == "TLSv1.3"


async def test_real_only_a_peer_without_a_certificate_is_refused() -> None:
    async with listening(Loopback()) as listener:
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port, ssl=_client(FOR_SOURCE))
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            assert await reader.read(1) == b""
        writer.close()
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            await writer.wait_closed()
        with pytest.raises(ChannelFailed, match="did not connect"):
            await listener.accept(0)
