"""A channel in memory, with the same manners as the real one: pinned certificates, one peer, and a link that breaks.

``FakeSegment`` is the network between two agents. It can lose one message of a direction, or break at one.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

from coordinator.agent.messages import ChannelMessage
from coordinator.errors import ChannelFailed
from coordinator.protocol import Credentials

Trouble = Literal["none", "cut", "drop", "stall"]
Checkpoint = Callable[[], Awaitable[None]]


async def _no_checkpoint() -> None:
    await asyncio.sleep(0)


@dataclass
class FakeSegment:
    """What lies between the agents. Message number ``at`` from the connecting (``up``) or the listening side is lost
    (``drop``), lost with all that follow it (``stall``), or lost with the link (``cut``). ``sent`` counts them,
    ``parted`` is told of a loss."""

    trouble: Trouble = "none"
    up: bool = True
    at: int = 0
    parted: Callable[[], None] = lambda: None
    sent: dict[bool, list[str]] = field(default_factory=lambda: {True: [], False: []})
    listeners: dict[int, FakeListener] = field(default_factory=dict)
    ports: itertools.count[int] = field(default_factory=lambda: itertools.count(40000))

    def fate(self, up: bool, message: ChannelMessage) -> Trouble:
        """Count a message, and say what happens to it."""
        self.sent[up].append(type(message).__name__)
        number = len(self.sent[up])
        hit = number >= self.at if self.trouble == "stall" else number == self.at
        if self.trouble == "none" or up is not self.up or not hit:
            return "none"
        self.parted()
        return self.trouble

    async def listen(
        self, credentials: Credentials, migration: str, checkpoint: Checkpoint = _no_checkpoint
    ) -> FakeListener:
        """As ``channel.Listener.open``."""
        await checkpoint()
        listener = FakeListener(self, next(self.ports), credentials, migration, checkpoint)
        self.listeners[listener.port] = listener
        return listener

    async def connect(
        self, port: int, credentials: Credentials, migration: str, checkpoint: Checkpoint = _no_checkpoint
    ) -> FakeChannel:
        """As ``channel.connect``."""
        await checkpoint()
        listener = self.listeners.get(port)
        if listener is None or not listener.takes(credentials, migration):
            raise ChannelFailed(f"connecting to the other agent at port {port}: refused")
        here, there = FakeChannel(self, True, checkpoint), FakeChannel(self, False, listener.checkpoint)
        here.peer, there.peer = there, here
        listener.accepted.set_result(there)
        await checkpoint()
        return here


class FakeListener:
    """The destination's end, in memory; see ``channel.Listener``."""

    def __init__(
        self, segment: FakeSegment, port: int, credentials: Credentials, migration: str, checkpoint: Checkpoint
    ) -> None:
        self.port = port
        self.checkpoint = checkpoint
        self.accepted: asyncio.Future[FakeChannel] = asyncio.get_running_loop().create_future()
        self._taken = False
        self._segment = segment
        self._credentials = credentials
        self._migration = migration

    def takes(self, credentials: Credentials, migration: str) -> bool:
        """Whether both sides accept each other's certificate, it is the same migration, and the first peer."""
        pinned = credentials.peer_certificate == self._credentials.certificate
        pinned = pinned and self._credentials.peer_certificate == credentials.certificate
        return pinned and migration == self._migration and not self.accepted.done()

    async def accept(self, deadline_s: float) -> FakeChannel:
        """See ``channel.Listener``."""
        await self.checkpoint()
        try:
            async with asyncio.timeout(deadline_s):
                channel = await asyncio.shield(self.accepted)
        except TimeoutError as error:
            raise ChannelFailed(f"the source's agent did not connect within {deadline_s:g} s") from error
        self._taken = True
        return channel

    async def close(self) -> None:
        """See ``channel.Listener``."""
        self._segment.listeners.pop(self.port, None)
        if not self.accepted.done():
            self.accepted.cancel()
        elif not self._taken and not self.accepted.cancelled():
            await self.accepted.result().close()


class FakeChannel:
    """One end. What was sent before the other end closed is still received, as with TCP."""

    peer: FakeChannel

    def __init__(self, segment: FakeSegment, up: bool, checkpoint: Checkpoint = _no_checkpoint) -> None:
        self._segment = segment
        self._up = up
        self._checkpoint = checkpoint
        self._arrived: deque[tuple[ChannelMessage, bytes]] = deque()
        self._news = asyncio.Event()
        self._down = False

    async def send(self, message: ChannelMessage, payload: bytes = b"") -> None:
        """See ``Channel``."""
        await self._checkpoint()
        if self._down:
            raise ChannelFailed("sending to the other agent: the link is down")
        fate = self._segment.fate(self._up, message)
        if fate == "cut":
            self.cut()
        elif fate == "none":
            self.peer.take(message, payload)
        await self._checkpoint()

    def take(self, message: ChannelMessage, payload: bytes) -> None:
        """A message arrives."""
        self._arrived.append((message, payload))
        self._news.set()

    async def receive(self) -> tuple[ChannelMessage, bytes]:
        """See ``Channel``."""
        await self._checkpoint()
        while not self._arrived:
            if self._down:
                raise ChannelFailed("the other agent closed the channel")
            self._news.clear()
            await self._news.wait()
        received = self._arrived.popleft()
        await self._checkpoint()
        return received

    def cut(self) -> None:
        """The link is gone, for both ends."""
        for end in (self, self.peer):
            end._down = True
            end._news.set()

    async def close(self) -> None:
        """See ``Channel``."""
        self.cut()


def fake_channel(segment: FakeSegment | None = None) -> tuple[FakeChannel, FakeChannel]:
    """Both ends of a link: the source's and the destination's."""
    segment = segment or FakeSegment()
    source, destination = FakeChannel(segment, True), FakeChannel(segment, False)
    source.peer, destination.peer = destination, source
    return source, destination
