"""65 000 connections: what is one message, one line or one folder of them has room for all."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

from coordinator.agent.channel import MAX_MESSAGE_BYTES
from coordinator.agent.fakes.clock import run
from coordinator.agent.fakes.files import FakeFilesTarget
from coordinator.agent.fakes.images import FakeImageSpace
from coordinator.agent.fakes.world import Life, World
from coordinator.agent.handing_back import HandBack
from coordinator.agent.incoming import receive_images
from coordinator.agent.messages import CHANNEL_MESSAGES, ChannelMessage, ImagesComplete, Kept, Unfinished
from coordinator.agent.network import NetfixNetwork, socket_facts
from coordinator.agent.outgoing import send_images
from coordinator.agent.settling import losses, unfinished
from coordinator.journal import Phase
from coordinator.protocol import LINE_LIMIT_BYTES, HalfResult
from coordinator.wire import decode, encode
from netfix.sockets import SocketRecord
from tests.unit.agent.stage import make_plan

MANY = 65_000
LONGEST = "2001:db8:1111:2222:3333:4444:5555:6666"
HANDSHAKES = [SocketRecord("ipv6", "tcp", "SYN_RECV", LONGEST, 443, LONGEST, port, 0, 0, 0) for port in range(1, MANY)]


class Wire:
    """What is sent, as it is on the wire, and taken out again. `largest`: bytes of the longest header or payload."""

    def __init__(self) -> None:
        self._sent: deque[tuple[bytes, bytes]] = deque()
        self.largest = 0

    async def send(self, message: ChannelMessage, payload: bytes = b"") -> None:
        header = json.dumps({"type": type(message).__name__, **encode(message)}).encode()
        self.largest = max(self.largest, len(header), len(payload))
        self._sent.append((header, payload))

    async def receive(self) -> tuple[ChannelMessage, bytes]:
        header, payload = self._sent.popleft()
        data = json.loads(header)
        return decode(CHANNEL_MESSAGES[data.pop("type")], data), payload

    async def close(self) -> None: ...


def test_a_result_with_all_sockets_is_a_line() -> None:
    result = HalfResult(outcome="moved", phase=Phase.RELEASED, sockets=socket_facts(HANDSHAKES))
    data = encode(result)
    line = json.dumps({"id": 1, "reply": data}).encode()
    assert len(line) < LINE_LIMIT_BYTES / 2, "a host has a few more of them"
    assert decode(HalfResult, data) == result


def test_an_image_for_every_connection_arrives(tmp_path: Path) -> None:
    world = World(tmp_path, make_plan())
    here, there = (FakeImageSpace(Life(world, machine)) for machine in (world.source, world.destination))
    world.source.files = {f"tcp-stream-{inode:x}.img": b"%d" % inode for inode in range(MANY)}
    world.destination.files = {}
    wire = Wire()

    async def both() -> None:
        await send_images(wire, here, {}, lambda *_: None)
        await wire.send(ImagesComplete(sizes=here.sizes(), pages_later=False))
        await receive_images(wire, there, None, _track, FakeFilesTarget(Life(world, world.destination)))

    run(both())
    assert world.destination.files == world.source.files
    assert wire.largest < MAX_MESSAGE_BYTES


async def _track(_: bytes) -> None:
    raise AssertionError("no connections were sent")


class NoNetwork(NetfixNetwork):
    """Nothing is taken in."""

    def __init__(self) -> None: ...

    async def take_in(self, *_: object) -> None: ...


def test_a_flood_of_half_open_connections_is_a_question_of_bounded_length() -> None:
    wire = Wire()

    async def ask() -> ChannelMessage:
        await wire.send(Kept(packets=()))
        await HandBack(NoNetwork()).take(wire, unfinished(HANDSHAKES))
        return (await wire.receive())[0]

    question = run(ask())
    assert isinstance(question, Unfinished)
    assert 0 < len(question.sockets) < 2000
    (sentence,) = losses(HANDSHAKES)
    assert len(sentence) < 500
