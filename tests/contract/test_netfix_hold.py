"""The contract of `Hold`, over NFQUEUE and the fake: datagrams to one socket, behind a gate."""

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Protocol

import pytest

from netfix.errors import KernelRefusedError
from netfix.gate import CLOSED, OPEN, NftGate, holding, releasing
from netfix.hold import FakeHold, Hold, NfqueueHold
from netfix.hold_buffer import UDP, HeldPacket, HoldLimits
from tests.contract.netfix_segment import SERVICE, SERVICE6, Segment, segment

LIMITS = HoldLimits(packets=10, bytes=10_000)
PORT = 9000


class Rig(Protocol):
    """A hold, and the network around it."""

    @property
    def hold(self) -> Hold:
        """The one under test."""

    async def start(self) -> None:
        """Open the hold; from here on the gate queues."""

    async def send(self, *numbers: int) -> None:
        """Datagrams arrive, and the hold has seen them when this returns."""

    async def received(self) -> list[int]:
        """The datagrams that the service has got since it was last asked."""

    async def release(self, failure: Exception | None = None) -> None:
        """The gate goes on queueing behind a release, so that what comes later is the hold's business too."""

    async def discard(self) -> None:
        """Give up."""


class FakeRig:
    """What the fake does by itself."""

    def __init__(self) -> None:
        self.hold = FakeHold(LIMITS)

    async def start(self) -> None:
        await self.hold.open()

    async def send(self, *numbers: int) -> None:
        for number in numbers:
            self.hold.arrive(HeldPacket(number, UDP, 30, PORT))

    async def received(self) -> list[int]:
        found = [packet.id for packet in self.hold.delivered]
        self.hold.delivered.clear()
        return found

    async def release(self, failure: Exception | None = None) -> None:
        await self.hold.release(lambda: _open(failure))

    async def discard(self) -> None:
        await self.hold.discard()


async def _open(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


class NetworkRig:
    """A service's socket on the host, a peer that sends to it."""

    def __init__(self, cable: Segment, address: str) -> None:
        self.cable = cable
        self.address = address
        self.hold = NfqueueHold(LIMITS)
        self.sent = 0

    async def build(self) -> None:
        """Gate and sockets."""
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET

        def bound() -> socket.socket:
            made = socket.socket(family, socket.SOCK_DGRAM)
            made.bind((self.address, PORT))
            made.setblocking(False)
            return made

        self.gate = await self.cable.host.call(lambda: NftGate("test", [self.address]))
        self.service = await self.cable.host.call(bound)
        self.peer = await self.cable.peer.call(lambda: socket.socket(family, socket.SOCK_DGRAM))
        await self.gate.set(CLOSED)

    async def start(self) -> None:
        await self.cable.host.run(self.hold.open())
        await self.gate.set(holding(self.hold.queue))

    async def send(self, *numbers: int) -> None:
        for number in numbers:
            self.peer.sendto(b"%d" % number, (self.address, PORT))
        self.sent += len(numbers)
        await self.cable.arrived()  # a cable keeps the order: they are in the queue
        if self.hold.queue is not None:
            async with asyncio.timeout(10):
                await self._seen()

    async def _seen(self) -> None:
        while True:
            if (await self.cable.host.call(self.hold.report)).held_packets >= self.sent:
                return
            await asyncio.sleep(0)

    async def received(self) -> list[int]:
        found = []
        while True:
            try:
                found.append(int(self.service.recv(16)))
            except BlockingIOError:
                return found

    async def release(self, failure: Exception | None = None) -> None:
        await self.gate.set(releasing(self.hold.queue))
        await self.cable.host.run(self.hold.release(lambda: _open(failure)))

    async def discard(self) -> None:
        await self.cable.host.run(self.hold.discard())

    async def close(self) -> None:
        """Everything that was made here."""
        await self.cable.host.call(self.hold.close)
        self.gate.close()
        self.service.close()
        self.peer.close()


@pytest.fixture(params=["fake", SERVICE, SERVICE6])
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    if request.param == "fake":
        yield FakeRig()
        return
    async with segment() as cable:
        built = NetworkRig(cable, request.param)
        await built.build()
        yield built
        await built.close()


async def test_a_queue_is_there_from_open_to_close(rig: Rig) -> None:
    numbers = [rig.hold.queue]
    await rig.start()
    number = rig.hold.queue
    await rig.start()
    assert numbers == [None] != [number]
    assert rig.hold.queue == number
    assert rig.hold.report().mode in ("queue", "target")
    rig.hold.close()
    rig.hold.close()
    numbers.append(rig.hold.queue)
    assert numbers == [None, None]


async def test_everything_is_kept_and_then_let_go_in_order(rig: Rig) -> None:
    await rig.start()
    await rig.send(*range(8))
    assert await rig.received() == []
    waiting = rig.hold.report()
    assert (waiting.held_packets, waiting.waiting_packets, waiting.released) == (8, 8, 0)
    assert waiting.held_bytes == waiting.waiting_bytes > 0
    await rig.release()
    assert await rig.received() == list(range(8))
    assert rig.hold.report() == replace(waiting, waiting_packets=0, waiting_bytes=0, released=8)


async def test_what_comes_after_the_release_is_let_go_at_once(rig: Rig) -> None:
    await rig.start()
    await rig.send(0)
    await rig.release()
    await rig.send(1, 2)
    assert await rig.received() == [0, 1, 2]
    report = rig.hold.report()
    assert (report.released, report.late, report.waiting_packets) == (1, 2, 0)


async def test_a_second_release_changes_nothing(rig: Rig) -> None:
    await rig.start()
    await rig.send(0)
    await rig.release()
    await rig.release()
    assert await rig.received() == [0]


async def test_nothing_comes_out_of_a_hold_that_was_discarded(rig: Rig) -> None:
    await rig.start()
    await rig.send(0, 1)
    await rig.discard()
    await rig.send(2)
    await rig.release()
    await rig.send(3)
    assert await rig.received() == []
    report = rig.hold.report()
    assert (report.discarded, report.released, report.late) == (4, 0, 0)


async def test_when_full_the_oldest_datagram_goes(rig: Rig) -> None:
    await rig.start()
    await rig.send(*range(15))
    await rig.release()
    assert await rig.received() == list(range(5, 15))
    report = rig.hold.report()
    assert (report.held_packets, report.dropped_udp, report.dropped_other, report.released) == (15, 5, 0, 10)


async def test_a_gate_that_will_not_open_holds_nothing_back(rig: Rig) -> None:
    await rig.start()
    await rig.send(0, 1)
    with pytest.raises(KernelRefusedError):
        await rig.release(KernelRefusedError("no"))
    await rig.send(2)
    assert await rig.received() == [0, 1, 2]


async def test_closing_gives_up_what_is_held(rig: Rig) -> None:
    await rig.start()
    await rig.send(0, 1)
    rig.hold.close()
    await rig.send(2)
    assert await rig.received() == []
    assert rig.hold.report().held_packets == 2


async def test_a_fake_kernel_without_queues() -> None:
    hold = FakeHold(kernel_lacks=True)
    await hold.open()
    assert hold.queue is None
    assert holding(hold.queue) == replace(OPEN, passing=False)
    hold.arrive(HeldPacket(1, UDP, 30, PORT))
    assert (await hold.release(lambda: _open(None))).mode == "none"
    assert hold.delivered == []
