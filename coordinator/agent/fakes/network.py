"""The network of one agent process on a machine of the ``World``: the real ``NetfixNetwork`` over netfix's fakes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from coordinator.agent.fakes.world import Life
from coordinator.agent.network import NetfixNetwork
from coordinator.protocol import MigrationPlan
from netfix.address import AddressRecord, FakeAddressBook, InterfaceRecord
from netfix.conntrack import FakeConnectionTable
from netfix.conntrack_entry import Connection, Flow
from netfix.delivery import FakeDelivery
from netfix.errors import KernelRefusedError
from netfix.frames import FakeFramePort
from netfix.gate import FakeGate, GateState, state_name
from netfix.hold import FakeHold, HoldReport, OpenGate
from netfix.movers.base import AddressMover, MoverFailedError, Role
from netfix.movers.fake import FakeMover
from netfix.movers.l2 import Announcement, L2Mover
from netfix.neighbours import FakeNeighbourhood
from netfix.sockets import FakeSocketInventory, SocketRecord

_INODE = 7


class _StepwiseGate:
    """netfix's fake gate, one checkpoint before and one after each change."""

    def __init__(self, life: Life, gate: FakeGate) -> None:
        self._life = life
        self._gate = gate

    async def set(self, state: GateState) -> None:
        await self._life.verb(f"gate {state_name(state)}", KernelRefusedError("no such gate"))
        await self._gate.set(state)
        await self._life.done(f"gate {state_name(state)}")

    async def state(self) -> GateState | None:
        return await self._gate.state()

    async def remove(self) -> None:
        await self._life.verb("gate removed", KernelRefusedError("no such gate"))
        await self._gate.remove()
        await self._life.done("gate removed")

    def close(self) -> None:
        self._gate.close()


class _StepwiseBook:
    """netfix's fake address book, likewise."""

    def __init__(self, life: Life, book: FakeAddressBook) -> None:
        self._life = life
        self._book = book

    async def find(self, address: str) -> list[AddressRecord]:
        return await self._book.find(address)

    async def add(self, record: AddressRecord) -> None:
        await self._life.verb("address added", KernelRefusedError("no such address"))
        await self._book.add(record)
        await self._life.done("address added")

    async def remove(self, record: AddressRecord) -> None:
        await self._life.verb("address removed", KernelRefusedError("no such address"))
        await self._book.remove(record)
        await self._life.done("address removed")

    async def interface(self, name: str) -> InterfaceRecord:
        return await self._book.interface(name)

    async def on_interface(self, name: str) -> list[AddressRecord]:
        return await self._book.on_interface(name)

    def close(self) -> None:
        """The machine's book outlives the agent."""


class _StepwiseHold:
    """netfix's fake hold, likewise; it goes with the agent's process, and what it lets go reaches the service."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._hold = FakeHold()
        self._told = 0

    @property
    def queue(self) -> int | None:
        return self._hold.queue

    async def open(self) -> None:
        await self._life.verb("hold opened", KernelRefusedError("no queue"))
        await self._hold.open()
        self._life.machine.holds.append(self._hold)
        self._life.at_death.append(self.close)
        await self._life.done("hold opened")

    def report(self) -> HoldReport:
        return self._hold.report()

    def kept(self, flows: Collection[Flow]) -> list[bytes]:
        return self._hold.kept(flows)

    async def release(self, open_gate: OpenGate) -> HoldReport:
        await self._life.verb("hold released", KernelRefusedError("no verdict"))

        async def opening() -> None:
            self._deliver()
            await open_gate()

        try:
            report = await self._hold.release(opening)
        finally:
            self._deliver()
        await self._life.done("hold released")
        return report

    async def discard(self) -> HoldReport:
        await self._life.verb("hold discarded", KernelRefusedError("no verdict"))
        report = await self._hold.discard()
        await self._life.done("hold discarded")
        return report

    def close(self) -> None:
        self._deliver()
        if self._hold in self._life.machine.holds:
            self._life.machine.holds.remove(self._hold)
        self._hold.close()

    def _deliver(self) -> None:
        for packet in self._hold.delivered[self._told :]:
            self._life.world.deliver(self._life.machine, packet.id)
        self._told = len(self._hold.delivered)


class _StepwiseDelivery(FakeDelivery):
    """netfix's fake way in, likewise: what comes in ends the handshake that waited for it."""

    def __init__(self, life: Life) -> None:
        super().__init__()
        self._life = life

    async def deliver(self, packets: Sequence[bytes]) -> None:
        await self._life.verb("packets taken in", KernelRefusedError("no raw socket"))
        await super().deliver(packets)
        if packets:
            self._life.machine.pending.clear()
        await self._life.done("packets taken in")


class _StepwiseTable(FakeConnectionTable):
    """netfix's fake connection table, likewise."""

    def __init__(self, life: Life) -> None:
        super().__init__(life.machine.tracked)
        self._life = life

    async def connections(self, addresses: Collection[str]) -> list[Connection]:
        await self._life.verb("connections read", KernelRefusedError("no table"))
        return await super().connections(addresses)

    async def create(self, connections: Sequence[Connection]) -> None:
        await self._life.verb("connections created", KernelRefusedError("the table is full"))
        await super().create(connections)
        await self._life.done("connections created")

    async def remove(self, addresses: Collection[str], spare: Collection[str] = ()) -> None:
        await self._life.verb("connections removed", KernelRefusedError("no table"))
        await super().remove(addresses, spare)
        await self._life.done("connections removed")


class _StepwisePort(FakeFramePort):
    """netfix's fake port, likewise."""

    def __init__(self, life: Life) -> None:
        super().__init__()
        self._life = life

    async def send(self, frames: Sequence[bytes]) -> None:
        await self._life.verb("frames sent", KernelRefusedError("interface down"))
        machine = self._life.machine
        if not machine.answers:
            self._life.world.broken.append(f"I2: {machine.name} announces addresses that it does not answer for")
        await machine.port.send(frames)
        await self._life.done("frames sent")


class _StepwiseMover(FakeMover):
    """netfix's fake mover, likewise."""

    def __init__(self, life: Life, role: Role) -> None:
        super().__init__(role, life.world.way)
        self._life = life

    async def divert(self) -> None:
        await self._life.verb("mover diverts", MoverFailedError("no such way"))
        await super().divert()
        await self._life.done("mover diverts")

    async def back(self) -> None:
        await self._life.verb("mover goes back", MoverFailedError("no such way"))
        await super().back()
        await self._life.done("mover goes back")

    async def released(self, peers: Collection[str]) -> tuple[str, ...]:
        await self._life.verb("mover released", MoverFailedError("no such way"))
        return await super().released(peers)


class _StepwiseInventory(FakeSocketInventory):
    """netfix's fake inventory, likewise; it has the workload's connection wherever the workload is."""

    def __init__(self, life: Life, address: str) -> None:
        super().__init__()
        self._life = life
        self._address = address

    async def sockets(self) -> list[SocketRecord]:
        await self._life.verb("sockets read", KernelRefusedError("no sock_diag"))
        here = ("ipv4", "tcp", "ESTABLISHED", self._address, 7000, "192.0.2.99", 50000, _INODE, 0, 0)
        return [] if self._life.machine.copy == "absent" else [SocketRecord(*here)]

    async def pending(self, addresses: Sequence[str]) -> list[SocketRecord]:
        await self._life.verb("queues read", KernelRefusedError("no sock_diag"))
        return list(self._life.machine.pending)


def fake_mover(life: Life, plan: MigrationPlan, role: Role) -> AddressMover:
    """The real mover of a segment over netfix's fakes; for the other kinds, netfix's fake."""
    if plan.workload.mover.kind != "l2":
        return _StepwiseMover(life, role)
    announcements = [
        Announcement(move.address, "", move.announce_at_source if role == "source" else move.announce_at_destination)
        for move in plan.addresses
    ]
    return L2Mover(role, _StepwisePort(life), announcements, FakeNeighbourhood(), sleep=life.sleep)


def fake_network(life: Life, plan: MigrationPlan, role: Role) -> NetfixNetwork:
    """A half's network on its machine of the world."""
    machine = life.machine
    addresses = [move.address for move in plan.addresses]
    return NetfixNetwork(
        machine.interface,
        plan.addresses,
        gate=_StepwiseGate(life, FakeGate(plan.id, addresses, machine.gates)),
        book=_StepwiseBook(life, machine.book),
        mover=fake_mover(life, plan, role),
        inventory=_StepwiseInventory(life, addresses[0]),
        hold=_StepwiseHold(life),
        delivery=_StepwiseDelivery(life),
        table=_StepwiseTable(life),
        inodes=lambda _: {_INODE},
    )
