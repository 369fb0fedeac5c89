"""The channel between the two halves: framed messages over mutual TLS 1.3.

Each side has a certificate minted for this one migration and accepts exactly one from the other side: the handshake
checks it as the only trust anchor, and afterwards it is compared byte for byte. A frame is two unsigned 32-bit lengths
(network order), a JSON object ``{"type", …fields}`` and a payload. Foreign errors become ``ChannelFailed`` here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import struct
from typing import Protocol, TypeVar

from coordinator.agent.messages import CHANNEL_MESSAGES, ChannelMessage, GiveUp, Hello
from coordinator.errors import ChannelFailed, LivemoveError, PeerAborted, ProtocolError
from coordinator.protocol import VERSION, Credentials
from coordinator.wire import decode, encode

_HEADER = struct.Struct("!II")
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
CHUNK_BYTES = 1024 * 1024

#: A host that vanishes without a word is noticed after about 15 s, while waiting and while sending (tcp(7)).
_KEEPALIVE = {
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 5,
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): 5,
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 2,
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): 15_000,
}

M = TypeVar("M", bound=ChannelMessage)


class Channel(Protocol):
    """A reliable, ordered, private stream of messages to the other half."""

    async def send(self, message: ChannelMessage, payload: bytes = b"") -> None:
        """Send one message; raise ``ChannelFailed`` if the link is down. Several tasks may send at a time: their
        messages come one after the other."""

    async def receive(self) -> tuple[ChannelMessage, bytes]:
        """The next message; raise ``ChannelFailed`` if the link is down."""

    async def close(self) -> None:
        """Close the link. Idempotent, never raises."""


async def expect(channel: Channel, kind: type[M]) -> M:
    """Receive a message of that kind. The other half's ``GiveUp`` becomes ``PeerAborted`` with its reason."""
    message, _ = await channel.receive()
    if isinstance(message, GiveUp):
        raise peer_aborted(message)
    if not isinstance(message, kind):
        raise ProtocolError(f"the other half sent {type(message).__name__} where {kind.__name__} was due")
    return message


def peer_aborted(message: GiveUp) -> PeerAborted:
    """The other half's reason as an error that keeps its words."""
    error = LivemoveError.from_wire(message.error)
    return PeerAborted(f"{error.code}: {error.message}", error.hint)


class TlsChannel:
    """The real channel, over an asyncio stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        link: socket.socket = writer.get_extra_info("socket")
        for option, value in _KEEPALIVE.items():
            link.setsockopt(*option, value)

    async def send(self, message: ChannelMessage, payload: bytes = b"") -> None:
        """See ``Channel``."""
        header = json.dumps({"type": type(message).__name__, **encode(message)}).encode()
        try:
            self._writer.write(_HEADER.pack(len(header), len(payload)) + header)
            if payload:
                self._writer.write(payload)
            await self._writer.drain()
        except OSError as error:
            raise ChannelFailed(f"sending to the other agent: {error}") from error

    async def receive(self) -> tuple[ChannelMessage, bytes]:
        """See ``Channel``."""
        try:
            sizes = _HEADER.unpack(await self._reader.readexactly(_HEADER.size))
            if max(sizes) > MAX_MESSAGE_BYTES:
                raise ProtocolError(f"the other agent sent a message of {max(sizes)} bytes")
            data = json.loads(await self._reader.readexactly(sizes[0]))
            payload = await self._reader.readexactly(sizes[1])
        except asyncio.IncompleteReadError as error:
            raise ChannelFailed("the other agent closed the channel") from error
        except OSError as error:
            raise ChannelFailed(f"receiving from the other agent: {error}") from error
        except ValueError as error:
            raise ProtocolError(f"the other agent sent no JSON: {error}") from error
        kind = CHANNEL_MESSAGES.get(str(data.pop("type", "")))
        if kind is None:
            raise ProtocolError("the other agent sent a message of an unknown type")
        return decode(kind, data), payload

    async def close(self) -> None:
        """See ``Channel``."""
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._writer.wait_closed()


def _context(purpose: int, credentials: Credentials) -> ssl.SSLContext:
    context = ssl.SSLContext(purpose)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the certificate itself is pinned, names say nothing here
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=credentials.peer_certificate.decode())
    # ssl reads a key from files only: an anonymous memory file never reaches a disk.
    descriptor = os.memfd_create("livemove-credentials", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, credentials.key + credentials.certificate)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    return context


def _check_pinned(writer: asyncio.StreamWriter, credentials: Credentials) -> None:
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    if shown != ssl.PEM_cert_to_DER_cert(credentials.peer_certificate.decode()):
        raise ChannelFailed("the other end of the channel showed a certificate that is not this migration's")


async def connect(address: str, port: int, credentials: Credentials, migration: str, deadline_s: float) -> Channel:
    """Connect to the destination half, prove who we are, and exchange ``Hello``."""
    try:
        async with asyncio.timeout(deadline_s):
            reader, writer = await asyncio.open_connection(
                address, port, ssl=_context(ssl.PROTOCOL_TLS_CLIENT, credentials), limit=2 * CHUNK_BYTES
            )
            channel = TlsChannel(reader, writer)
            try:
                _check_pinned(writer, credentials)
                await channel.send(Hello(version=VERSION, migration=migration))
                await _expect_hello(channel, migration)
            except BaseException:
                await channel.close()
                raise
            return channel
    except TimeoutError as error:
        raise ChannelFailed(
            f"connecting to the other agent at {address}:{port}: no answer in {deadline_s:g} s"
        ) from error
    except OSError as error:
        raise ChannelFailed(f"connecting to the other agent at {address}:{port}: {error}") from error


class Listener:
    """The destination's end before the source has come: accepts one proven peer, and no other."""

    def __init__(self, server: asyncio.Server, accepted: asyncio.Future[Channel], port: int) -> None:
        self._server = server
        self._accepted = accepted
        self._taken = False
        self.port = port

    @classmethod
    async def open(cls, address: str, credentials: Credentials, migration: str) -> Listener:
        """Listen on a free port of ``address``; raise ``ChannelFailed`` if that is not possible."""
        accepted: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            channel = TlsChannel(reader, writer)
            try:
                _check_pinned(writer, credentials)
                await _expect_hello(channel, migration)
                if accepted.done():
                    raise ChannelFailed("a second peer on the channel")
                await channel.send(Hello(version=VERSION, migration=migration))
            except LivemoveError:
                await channel.close()
            else:
                accepted.set_result(channel)

        try:
            context = _context(ssl.PROTOCOL_TLS_SERVER, credentials)
            server = await asyncio.start_server(serve, address, 0, ssl=context, limit=2 * CHUNK_BYTES)
        except OSError as error:
            raise ChannelFailed(f"listening on {address}: {error}") from error
        return cls(server, accepted, server.sockets[0].getsockname()[1])

    async def accept(self, deadline_s: float) -> Channel:
        """The channel to the source half; raise ``ChannelFailed`` if it does not come within ``deadline_s``."""
        try:
            async with asyncio.timeout(deadline_s):
                channel = await asyncio.shield(self._accepted)
        except TimeoutError as error:
            raise ChannelFailed(f"the source's agent did not connect within {deadline_s:g} s") from error
        self._taken = True
        return channel

    async def close(self) -> None:
        """Stop listening. A channel that ``accept`` has returned stays; the source hears that nobody wants another.
        Idempotent."""
        self._server.close()
        if not self._accepted.done():
            self._accepted.cancel()
        elif not self._taken and not self._accepted.cancelled():
            await self._accepted.result().close()


async def _expect_hello(channel: Channel, migration: str) -> None:
    hello = await expect(channel, Hello)
    if (hello.version, hello.migration) != (VERSION, migration):
        raise ProtocolError(f"the other agent speaks version {hello.version} for migration {hello.migration}")
