"""The adapters of one agent process on a machine of the ``World``, and an agent put together with them."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from coordinator.agent.assembly import AnyListener, Parts, Places
from coordinator.agent.channel import Channel
from coordinator.agent.destination import DestinationHalf
from coordinator.agent.fakes.channel import FakeSegment
from coordinator.agent.fakes.criu import FakeCheckpointer
from coordinator.agent.fakes.memory import OUTER_PID, FakeFilling, FakeTrackers, fake_read
from coordinator.agent.fakes.runtime import FakeRuntime
from coordinator.agent.fakes.world import Life, Machine
from coordinator.agent.half import Adapters
from coordinator.agent.memory.copying import MemorySource
from coordinator.agent.network import NetfixNetwork
from coordinator.agent.source import SourceHalf
from coordinator.errors import CommandFailed, NotEnoughSpace, ProtocolError
from coordinator.events import EventSink
from coordinator.journal import Journal
from coordinator.protocol import Credentials, MemoryPolicy, MigrationPlan
from netfix.address import AddressRecord, FakeAddressBook, InterfaceRecord
from netfix.conntrack import FakeConnectionTable
from netfix.conntrack_entry import Connection
from netfix.errors import KernelRefusedError
from netfix.frames import FakeFramePort
from netfix.gate import FakeGate, GateState, state_name
from netfix.hold import FakeHold, HoldReport, OpenGate
from netfix.sockets import FakeSocketInventory, SocketRecord

_INODE = 7
_GONE_S = 30.0


class FakeImageSpace:
    """An ``ImageSpace`` in the machine's memory."""

    images = Path("/fake/images")
    work = Path("/fake/work")

    def __init__(self, life: Life) -> None:
        self._life = life
        self._machine = life.machine

    async def create(self, size_bytes: int) -> None:
        """See ``ImageSpace``."""
        await self._life.verb("images create", NotEnoughSpace("no memory"))
        self._machine.files = {}
        await self._life.done(f"image space of {size_bytes} bytes")

    async def remove(self) -> None:
        """See ``ImageSpace``."""
        await self._life.verb("images remove", CommandFailed("umount: busy"))
        self._machine.files = None
        await self._life.done("no image space")

    def sizes(self) -> dict[str, int]:
        """See ``ImageSpace``."""
        return {name: len(content) for name, content in self._files().items()}

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See ``ImageSpace``."""
        return self._files()[name][offset : offset + size]

    def write(self, name: str, offset: int, data: bytes) -> None:
        """See ``ImageSpace``."""
        if "/" in name or name in (".", ".."):
            raise ProtocolError(f"an image named {name!r} was sent")
        before = self._files().get(name, b"")
        self._files()[name] = before[:offset].ljust(offset, b"\0") + data + before[offset + len(data) :]

    def _files(self) -> dict[str, bytes]:
        if self._machine.files is None:
            raise FileNotFoundError("there is no image space")
        return self._machine.files


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


def fake_adapters(life: Life, plan: MigrationPlan) -> Adapters:
    """The doors of a half to a machine of the world; the network is the real ``NetfixNetwork`` over netfix's fakes."""
    machine = life.machine
    addresses = [move.address for move in plan.addresses]
    network = NetfixNetwork(
        machine.interface,
        plan.addresses,
        gate=_StepwiseGate(life, FakeGate(plan.id, addresses, machine.gates)),
        book=_StepwiseBook(life, machine.book),
        port=_StepwisePort(life),
        inventory=_StepwiseInventory(life, addresses[0]),
        hold=_StepwiseHold(life),
        table=_StepwiseTable(life),
        inodes=lambda _: {_INODE},
        sleep=life.sleep,
    )

    async def wait_gone(pid: int, started: int) -> bool:
        await life.checkpoint()
        running = machine.commands.get(pid) or machine.helpers.get(pid)
        if running is None or started != pid:
            return True
        await asyncio.wait((running,), timeout=_GONE_S)
        await life.checkpoint()
        return running.done()

    async def mend(root_pid: int) -> None:
        await life.verb("connections mended", PermissionError(f"not of process {root_pid}"))
        if machine.copy != "running":
            life.world.broken.append(f"connections of a copy that is {machine.copy} are mended")

    return Adapters(
        runtime=FakeRuntime(life),
        criu=FakeCheckpointer(life),
        images=FakeImageSpace(life),
        network=network,
        memory_source=lambda policy: fake_memory_source(life, policy),
        memory_destination=lambda: FakeFilling(life),
        pace=lambda _: None,
        wait_gone=wait_gone,
        start_time=lambda pid: pid if pid in machine.commands | machine.helpers else None,
        mend=mend,
    )


def fake_memory_source(life: Life, policy: MemoryPolicy) -> MemorySource:
    """The real ``MemorySource`` over the world's memory."""
    machine = life.machine

    def processes(_: int) -> dict[int, int]:
        return {pid: OUTER_PID + pid for pid in sorted({pid for pid, _ in machine.memory})}

    def started(pid: int) -> int | None:
        return 1 if machine.copy in ("running", "frozen") else None

    return MemorySource(
        policy,
        lambda _: FakeTrackers(life),
        clock=_now,
        read=partial(fake_read, life),
        processes=processes,
        started=started,
    )


def fake_parts(life: Life, segment: FakeSegment) -> Parts:
    """What an agent on a machine of the world is put together from."""

    def source(plan: MigrationPlan, journal: Journal, _: Places, sink: EventSink) -> SourceHalf:
        adapters = fake_adapters(life, plan)
        return SourceHalf(plan.source.name, plan, journal, adapters, sink=sink, clock=_now)

    def destination(plan: MigrationPlan, journal: Journal, _: Places, sink: EventSink) -> DestinationHalf:
        adapters = fake_adapters(life, plan)
        return DestinationHalf(plan.destination.name, plan, journal, adapters, sink=sink, clock=_now)

    async def listen(address: str, credentials: Credentials, migration: str) -> AnyListener:
        listener = await segment.listen(credentials, migration, life.checkpoint)
        life.at_death.append(lambda: _hang_up(listener.accepted))
        return listener

    async def connect(address: str, port: int, credentials: Credentials, migration: str, deadline_s: float) -> Channel:
        channel = await segment.connect(port, credentials, migration, life.checkpoint)
        life.at_death.append(channel.cut)
        return channel

    return Parts({"source": source, "destination": destination}, listen, connect)


def _hang_up(accepted: asyncio.Future[Any]) -> None:
    if accepted.done() and not accepted.cancelled():
        accepted.result().cut()


def _now() -> float:
    return asyncio.get_running_loop().time()


def places(machine: Machine) -> Places:
    """Where the agents of a machine keep their journals."""
    return Places(state=machine.state, run=machine.state / "run")
