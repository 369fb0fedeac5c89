"""The packet hold of a migration: what arrives for the service while it is frozen waits here, and is let go in order.

A packet that is dropped comes back after the sender's retransmission timeout (200 ms at least, a SYN after a second),
or, with UDP, never; one that is held is only as late as the freeze was long. The order in which a destination uses it:

1. `await hold.open()`, before the freeze: takes a free queue number, `hold.queue`, or None where the kernel has no
   NFQUEUE: then everything below works the same, and packets are dropped as a gate drops them. The report says so.
2. `await gate.set(holding(hold.queue))`: answering, nothing goes out, what comes in is queued.
3. When the sockets are there: `await gate.set(releasing(hold.queue))`: packets go out, what comes in is still queued.
4. When the tasks run: `await hold.release(lambda: gate.set(OPEN))`. Lets go what is held, oldest first; what arrives
   meanwhile queues up behind. When the queue is dry, it calls back, and the gate passes packets by itself; what slipped
   into the queue until then follows at once.
5. `await gate.remove()`, and then `hold.close()`. In this order, and not before 4: the kernel **drops every queued
   packet of the network namespace, of all queues,** when any netfilter hook goes away, as the base chains do with their
   table. `gate.set` keeps them, and another gate waits with its removal (see `hooks`).

To give up: `await gate.set(CLOSED)`, `await hold.discard()`, `hold.close()`.

So no packet is dropped between 2 and 5, and none is overtaken but in one moment: a packet that came into the queue
between its last look and the callback's effect (some tens of microseconds) can be overtaken by one that came after the
effect. They are `late` in the report, mostly 0. TCP does not mind.

Ends of the story that nobody planned: when the process dies, its queue goes with its socket. The kernel drops what was
in it, and, since the gate's rule has no bypass flag, what comes after: a dead agent lets nothing through to where no
socket is yet (I2). A peer that retransmits into the hold has both copies delivered; TCP throws the second away.

Measured (Linux 6.18, 2 cores, datagrams over veth): keeping a packet takes 6 µs of CPU, so that 50 000 a second are a
third of a core, and 200 000 a second for a while cost none; the event loop's other work is late by 1.4 ms (99 %) at
50 000 a second, which is why there is no thread. `release` of 1000 packets 3 ms, of 20 000 90 ms. A packet that goes
through the queue after a release takes 45 µs longer than one that does not. In 100 releases under 3000 datagrams a
second three were `late`, and none was overtaken. `open` takes 10 to 20 ms: trying out rules waits for the kernel.

Bounded in packets and bytes, see `hold_buffer`. At most so much, and 4096 packets that nobody has looked at yet, is in
the kernel's queue; beyond that the kernel drops, and says how many. UDP is let go no faster than the service reads it,
as far as its receive buffers tell (`udp_room`): a burst of what a freeze of 200 ms gathered would overflow them.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from . import nft
from .conntrack_entry import Flow
from .errors import KernelLacksError, from_errno
from .hold_buffer import HeldPacket, HoldBuffer, HoldLimits, Room
from .netlink import NETLINK_NETFILTER, NetlinkSocket, Refusal
from .nfqueue import ACCEPT, DROP, PacketQueue
from .segments import acknowledgements
from .udp_room import UdpRooms

PATIENCE_S = 0.25
"""How long UDP waits for a service that does not read, before it is let go regardless."""
RELEASE_S = 2.0
"""How long a release may wait for a service that reads slowly, all in all."""

_PER_WAKE_UP = 256
_PER_ROUND = 512
_PAUSE_S = 0.0005

OpenGate = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class HoldReport:
    """What became of the packets.

    `mode`: `queue` or `target`, the form of the gate's rule, or `none`: this kernel cannot hold. `held_packets`,
    `held_bytes`: all that came into the hold, of which the rest is a part: `released` before the gate opened, `late`
    after it (see the module), `discarded` by `discard`; `dropped_udp`, `dropped_other` for want of room here.
    `kernel_dropped`: did not get as far (queue or socket buffer full), or was thrown out of the queue by the kernel.
    `waiting_packets`, `waiting_bytes`: held now. With offloads one packet may be 64 KiB.
    """

    mode: str
    held_packets: int = 0
    held_bytes: int = 0
    waiting_packets: int = 0
    waiting_bytes: int = 0
    released: int = 0
    late: int = 0
    discarded: int = 0
    dropped_udp: int = 0
    dropped_other: int = 0
    kernel_dropped: int = 0


class Hold(Protocol):
    """The hold of one migration on one host. See the module for the order of calls."""

    @property
    def queue(self) -> int | None:
        """The queue number for the gate; None before `open`, and where the kernel cannot hold."""

    async def open(self) -> None:
        """Take a queue and begin to keep what comes into it; idempotent. Raises NotPermittedError, KernelRefusedError.

        Undo: `close`.
        """

    def report(self) -> HoldReport:
        """The counts up to now."""

    def kept(self, flows: Collection[Flow]) -> list[bytes]:
        """What those of the TCP segments held that go the way of one of the flows say besides their data, oldest first
        (`segments.acknowledgements`). They stay in the hold."""

    async def release(self, open_gate: OpenGate) -> HoldReport:
        """Let go of everything in order, call `open_gate` once, let go of what came until then.

        From here on whatever comes into the queue is let go at once, also if `open_gate` fails or the call is
        cancelled. `open_gate` must change the gate without awaiting anything else, as `Gate.set` does. Takes at most
        about `RELEASE_S`. Raises what `open_gate` raises.
        """

    async def discard(self) -> HoldReport:
        """Drop what is held and whatever still comes."""

    def close(self) -> None:
        """Let go of the queue: the kernel drops what is in it, and what comes to its number. Idempotent."""


async def hold_support() -> str:
    """How this kernel can send packets to a queue: `queue`, `target`, or `none`.

    Tried in a table of our own that is made and removed in one transaction, and with a queue. Raises
    NotPermittedError.
    """
    try:
        PacketQueue(HoldLimits()).close()
    except KernelLacksError:
        return nft.NO_QUEUE
    with NetlinkSocket(NETLINK_NETFILTER, "packet hold") as netlink:
        try:
            return nft.queue_form(netlink)
        except Refusal as refusal:
            raise from_errno(refusal.number, "packet hold", refusal.detail) from refusal


class _Mode(Enum):
    HOLDING = "holding"
    PASSING = "passing"
    DISCARDING = "discarding"


# --- the real one ----------------------------------------------------------------------------------------------------


class NfqueueHold:
    """A hold in NFQUEUE, in the network namespace of the thread that opens it, on that thread's event loop. See `Hold`.

    Packets are read by the event loop, a bounded number at each wake-up; what waits in the socket meanwhile is in the
    kernel's queue already and keeps its order.
    """

    def __init__(self, limits: HoldLimits | None = None, *, number: int | None = None) -> None:
        """Nothing is opened yet. With `number`, that queue and no other."""
        self._limits = limits or HoldLimits()
        self._number = number
        self._buffer = HoldBuffer(self._limits)
        self._mode = _Mode.HOLDING
        self._queue: PacketQueue | None = None
        self._rooms: UdpRooms | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._counts = HoldReport(nft.NO_QUEUE)
        self._vanished = 0

    @property
    def queue(self) -> int | None:
        return self._queue.number if self._queue is not None else None

    async def open(self) -> None:
        if self._queue is not None:
            return
        mode = await hold_support()
        self._counts = replace(self._counts, mode=mode)
        if mode == nft.NO_QUEUE:
            return
        try:
            self._queue = PacketQueue(self._limits, self._number)
            self._rooms = UdpRooms()
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._queue.fileno(), self._readable)
        except BaseException:
            self.close()
            raise

    def report(self) -> HoldReport:
        if self._queue is not None:
            dropped = self._queue.counters().dropped + self._vanished
            self._counts = replace(self._counts, kernel_dropped=dropped)
        return replace(self._counts, **self._buffer.counts())

    def kept(self, flows: Collection[Flow]) -> list[bytes]:
        return acknowledgements(self._buffer.heads(), flows)

    async def release(self, open_gate: OpenGate) -> HoldReport:
        try:
            if self._queue is not None and self._mode is _Mode.HOLDING:
                await self._let_go(self._queue, asyncio.get_running_loop())
            # No await of ours from the last look, which found nothing, to the next.
            await open_gate()
        finally:
            if self._mode is _Mode.HOLDING:
                self._mode = _Mode.PASSING
            if self._queue is not None:
                self._dispose(self._queue)
                self._readable()
        return self.report()

    async def discard(self) -> HoldReport:
        self._mode = _Mode.DISCARDING
        if self._queue is not None:
            self._dispose(self._queue)
            self._readable()
        return self.report()

    def close(self) -> None:
        if self._queue is not None:
            self.report()
            if self._loop is not None:
                self._loop.remove_reader(self._queue.fileno())
            self._queue.close()
            self._queue = None
        if self._rooms is not None:
            self._rooms.close()
            self._rooms = None

    def _readable(self) -> None:
        """Packets have come: keep them, or give them the verdict of the mode."""
        if self._queue is not None:
            self._absorb(self._queue)
            if self._mode is not _Mode.HOLDING:
                self._dispose(self._queue)

    def _absorb(self, queue: PacketQueue) -> bool:
        """Read some of what has come into the buffer: was there anything?"""
        packets = queue.receive(_PER_WAKE_UP)
        add = self._buffer.add
        victims = [victim for packet in packets for victim in add(packet)]
        if victims:
            queue.give(DROP, victims)
        return bool(packets)

    def _dispose(self, queue: PacketQueue) -> None:
        """Give everything in the buffer its verdict: too late for the order of a release, or to be dropped."""
        while len(self._buffer):
            ids = self._buffer.take(_PER_ROUND).ids
            if self._mode is _Mode.PASSING:
                queue.accept_up_to(ids[-1])
                self._counts = replace(self._counts, late=self._counts.late + len(ids))
            else:
                queue.give(DROP, ids)
                self._counts = replace(self._counts, discarded=self._counts.discarded + len(ids))

    async def _let_go(self, queue: PacketQueue, loop: asyncio.AbstractEventLoop) -> None:
        """Accept what is held, in order, until the queue is dry or `RELEASE_S` is over."""
        while self._absorb(queue):  # noqa: ASYNC110 - what comes is read, not waited for
            await asyncio.sleep(0)
        self._vanished += max(0, len(self._buffer) - queue.counters().waiting)
        end = loop.time() + RELEASE_S
        progress = loop.time()
        while loop.time() < end:
            patient = loop.time() < progress + PATIENCE_S
            if self._accept_some(queue, self._udp_rooms() if patient else None):
                progress = loop.time()
            if self._absorb(queue):
                await asyncio.sleep(0)
            elif len(self._buffer):
                await asyncio.sleep(_PAUSE_S)
            else:
                return
        while self._accept_some(queue, None):
            pass

    def _udp_rooms(self) -> dict[int, Room] | None:
        ports = self._buffer.udp_ports()
        return self._rooms.read(ports) if ports and self._rooms is not None else None

    def _accept_some(self, queue: PacketQueue, rooms: dict[int, Room] | None) -> int:
        """One round of a release: how many packets were let go."""
        ids, whole = self._buffer.take(_PER_ROUND, rooms)
        if ids and whole:
            queue.accept_up_to(ids[-1])
        elif ids:
            queue.give(ACCEPT, ids)
        self._counts = replace(self._counts, released=self._counts.released + len(ids))
        return len(ids)


# --- the fake --------------------------------------------------------------------------------------------------------


class FakeHold:
    """A hold in memory, for tests. `arrive` is a packet that comes into the queue; `delivered` is what was let go.

    `history` has the calls by name, with `open_gate` where that was called; `kernel_lacks` says that NFQUEUE is
    missing; `fail_next` is raised by the next `open` or `release`, which then does not happen.
    """

    def __init__(self, limits: HoldLimits | None = None, *, kernel_lacks: bool = False) -> None:
        self._buffer = HoldBuffer(limits or HoldLimits())
        self._mode = _Mode.HOLDING
        self._counts = HoldReport(nft.NO_QUEUE)
        self._kernel_lacks = kernel_lacks
        self._packets: dict[int, HeldPacket] = {}
        self.queue: int | None = None
        self.delivered: list[HeldPacket] = []
        self.history: list[str] = []
        self.fail_next: Exception | None = None
        self.closed = False

    def arrive(self, packet: HeldPacket) -> None:
        """A packet comes into the queue; without one it is dropped."""
        if self.queue is None:
            return
        self._packets[packet.id] = packet
        self._buffer.add(packet)
        if self._mode is not _Mode.HOLDING:
            self._dispose()

    def _dispose(self, late: bool = True) -> None:
        packets = [self._packets[ident] for ident in self._buffer.take(len(self._buffer)).ids]
        count = len(packets)
        if self._mode is _Mode.DISCARDING:
            self._counts = replace(self._counts, discarded=self._counts.discarded + count)
            return
        self.delivered += packets
        if late:
            self._counts = replace(self._counts, late=self._counts.late + count)
        else:
            self._counts = replace(self._counts, released=self._counts.released + count)

    def _call(self, name: str) -> None:
        failure, self.fail_next = self.fail_next, None
        if failure is not None:
            raise failure
        self.history.append(name)

    async def open(self) -> None:
        self._call("open")
        if not self._kernel_lacks:
            self.queue = self.queue or 4711
            self._counts = replace(self._counts, mode=nft.QUEUE)

    def report(self) -> HoldReport:
        return replace(self._counts, **self._buffer.counts())

    def kept(self, flows: Collection[Flow]) -> list[bytes]:
        return acknowledgements(self._buffer.heads(), flows)

    async def release(self, open_gate: OpenGate) -> HoldReport:
        self._call("release")
        try:
            self._dispose(late=False)
            self.history.append("open_gate")
            await open_gate()
        finally:
            if self._mode is _Mode.HOLDING:
                self._mode = _Mode.PASSING
            self._dispose()
        return self.report()

    async def discard(self) -> HoldReport:
        self.history.append("discard")
        self._mode = _Mode.DISCARDING
        self._dispose()
        return self.report()

    def close(self) -> None:
        self.queue = None
        self.closed = True
