"""The adapters of one agent process on a machine of the ``World``, and an agent put together with them."""

from __future__ import annotations

import asyncio
from typing import Any

from coordinator.agent.assembly import AnyListener, Parts, Places
from coordinator.agent.channel import Channel
from coordinator.agent.destination import DestinationHalf
from coordinator.agent.fakes.channel import FakeSegment
from coordinator.agent.fakes.criu import FakeCheckpointer
from coordinator.agent.fakes.files import FakeFilesSource, FakeFilesTarget
from coordinator.agent.fakes.images import FakeImageSpace
from coordinator.agent.fakes.memory import FakeFilling, fake_memory_source
from coordinator.agent.fakes.network import fake_network
from coordinator.agent.fakes.runtime import FakeRuntime
from coordinator.agent.fakes.world import Life, Machine
from coordinator.agent.half import Adapters
from coordinator.agent.source import SourceHalf
from coordinator.events import EventSink
from coordinator.journal import Journal
from coordinator.protocol import Credentials, MigrationPlan
from netfix.movers.base import Role

_GONE_S = 30.0


def fake_adapters(life: Life, plan: MigrationPlan, role: Role) -> Adapters:
    """The doors of a half to a machine of the world."""
    machine = life.machine

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
        network=fake_network(life, plan, role),
        memory_source=lambda policy: fake_memory_source(life, policy, _now),
        memory_destination=lambda: FakeFilling(life),
        pace=lambda _: None,
        wait_gone=wait_gone,
        start_time=lambda pid: pid if pid in machine.commands | machine.helpers else None,
        mend=mend,
        files_source=lambda: FakeFilesSource(life),
        files_target=lambda: FakeFilesTarget(life),
    )


def fake_parts(life: Life, segment: FakeSegment) -> Parts:
    """What an agent on a machine of the world is put together from."""

    def source(plan: MigrationPlan, journal: Journal, _: Places, sink: EventSink) -> SourceHalf:
        adapters = fake_adapters(life, plan, "source")
        return SourceHalf(plan.source.name, plan, journal, adapters, sink=sink, clock=_now)

    def destination(plan: MigrationPlan, journal: Journal, _: Places, sink: EventSink) -> DestinationHalf:
        adapters = fake_adapters(life, plan, "destination")
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
