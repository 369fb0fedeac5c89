"""Clients of an MQTT broker (3.1.1): at QoS 1 every message comes, on an unbroken connection once and in order."""

from __future__ import annotations

import struct
from collections.abc import Callable

from labs.clients.sessions import Session, Stream, WrongAnswer, expect, main

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK, PINGREQ, PINGRESP = 1, 2, 3, 4, 8, 9, 12, 13
QOS_1 = 0b0010
RETAIN = 0b0001


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("!H", len(data)) + data


class Mqtt:
    """One connection; OASIS MQTT 3.1.1, sections 2 and 3."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._identifier = 0

    @classmethod
    async def connect(cls, address: str, port: int, name: str) -> Mqtt:
        mqtt = cls(await Stream.connect(address, port))
        mqtt.send(CONNECT, 0, _text("MQTT") + struct.pack("!BBH", 4, 2, 60) + _text(name))
        expect(await mqtt.receive(), (CONNACK, 0, b"\0\0"), "CONNACK")
        return mqtt

    def send(self, kind: int, flags: int, body: bytes) -> None:
        size, left = b"", len(body)
        while True:
            left, low = left >> 7, left & 0x7F
            size += bytes([low | (0x80 if left else 0)])
            if not left:
                break
        self._stream.send(bytes([kind << 4 | flags]) + size + body)

    async def receive(self) -> tuple[int, int, bytes]:
        """Kind, flags and body of the next packet."""
        (first,) = await self._stream.exactly(1)
        size = shift = 0
        while True:
            (byte,) = await self._stream.exactly(1)
            size |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
        return first >> 4, first & 0xF, await self._stream.exactly(size)

    def publish(self, topic: str, payload: bytes, flags: int = QOS_1) -> bytes:
        """Send a message; the identifier with which it is to be acknowledged."""
        self._identifier = self._identifier % 0xFFFF + 1
        identifier = struct.pack("!H", self._identifier)
        self.send(PUBLISH, flags, _text(topic) + identifier + payload)
        return identifier

    async def subscribe(self, topic: str) -> None:
        self.send(SUBSCRIBE, 0b0010, struct.pack("!H", 1) + _text(topic) + b"\1")
        expect(await self.receive(), (SUBACK, 0, b"\0\1\1"), "SUBACK")

    async def message(self) -> tuple[int, str, bytes]:
        """The next message of a subscription, acknowledged: flags, topic and payload."""
        kind, flags, body = await self.receive()
        if kind != PUBLISH:
            raise WrongAnswer(f"packet {kind} {body[:40]!r} where a message was due")
        end = 2 + struct.unpack_from("!H", body)[0]
        self.send(PUBACK, 0, body[end : end + 2])
        return flags, body[2:end].decode(), body[end + 2 :]


class MqttSession(Session):
    def __init__(self, address: str, port: int, number: int) -> None:
        self._where = (address, port)
        self._number, self._count = number, 0

    async def _connect(self, role: str) -> Mqtt:
        return await Mqtt.connect(*self._where, f"{role}-{self._number}")


class Publisher(MqttSession):
    """Publishes at QoS 1, some at once, and is subscribed at QoS 1 on another connection."""

    connections = 2
    AT_ONCE = 3

    async def open(self) -> None:
        self._topic = f"lab/{self._number}"
        self._out, self._in = await self._connect("publisher"), await self._connect("subscriber")
        await self._in.subscribe(self._topic)

    async def step(self) -> None:
        first = self._count + 1
        identifiers = []
        for _ in range(self.AT_ONCE):
            self._count += 1
            identifiers.append(self._out.publish(self._topic, b"message %d" % self._count))
        for identifier in identifiers:
            expect(await self._out.receive(), (PUBACK, 0, identifier), "PUBACK")
        for number in range(first, self._count + 1):
            expect(await self._in.message(), (QOS_1, self._topic, b"message %d" % number), "the subscriber's message")


class Watcher(MqttSession):
    """Publishes into many topics, and is subscribed to all of them at once."""

    connections = 2
    TOPICS = 5

    async def open(self) -> None:
        self._out, self._in = await self._connect("one"), await self._connect("all")
        await self._in.subscribe(f"many/{self._number}/+")

    async def step(self) -> None:
        self._count += 1
        topic = f"many/{self._number}/{self._count % self.TOPICS}"
        identifier = self._out.publish(topic, b"%d" % self._count * 200)
        expect(await self._out.receive(), (PUBACK, 0, identifier), "PUBACK")
        expect(await self._in.message(), (QOS_1, topic, b"%d" % self._count * 200), "the message to all")


class Retained(MqttSession):
    """Publishes messages that the broker is to keep; at the end a new client gets the last one."""

    async def open(self) -> None:
        self._out = await self._connect("retaining")

    async def step(self) -> None:
        self._count += 1
        identifier = self._out.publish("lab/kept", b"%d" % self._count, QOS_1 | RETAIN)
        expect(await self._out.receive(), (PUBACK, 0, identifier), "PUBACK")
        self._out.send(PINGREQ, 0, b"")
        expect(await self._out.receive(), (PINGRESP, 0, b""), "PINGRESP")

    async def finish(self) -> None:
        late = await self._connect("late")
        await late.subscribe("lab/kept")
        expect(await late.message(), (QOS_1 | RETAIN, "lab/kept", b"%d" % self._count), "the message that was kept")


def sessions(address: str, port: int, folder: str) -> list[Session]:
    kinds: list[Callable[[str, int, int], Session]] = [*[Publisher] * 5, Watcher, Watcher, Retained]
    return [kind(address, port, number) for number, kind in enumerate(kinds)]


if __name__ == "__main__":
    main(sessions)
