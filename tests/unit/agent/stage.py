"""The stage for a transaction in memory: two real agents, the shipped fakes, the coordinator's order, a verdict.

Only the hosts, CRIU and the link are fakes. The request loop, both halves, the journals on disk, `recover` on the hosts
and `settle` in the coordinator are the real ones.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from coordinator.agent.fakes.channel import FakeSegment
from coordinator.agent.fakes.host import fake_parts, places
from coordinator.agent.fakes.world import CONNECTION, Life, Machine, World
from coordinator.agent.server import Agent
from coordinator.config import Configuration, Host
from coordinator.errors import ExitCode, LivemoveError, SessionLost
from coordinator.events import EventSink
from coordinator.facts import MoverSpec, Tree, WorkloadSpec
from coordinator.journal import Phase, read_state
from coordinator.protocol import (
    Abort,
    AddressMove,
    Credentials,
    Deadlines,
    Endpoint,
    HalfResult,
    MemoryPolicy,
    MigrationPlan,
    PrepareDestination,
    PrepareSource,
    Request,
    RunHalf,
)
from coordinator.recovery import Move, Told, settle
from coordinator.report.result import migration_result
from coordinator.wire import decode, encode

R = TypeVar("R")
ID = "20261120T061500-counter-3f9a"


def make_plan(
    deadlines: Deadlines | None = None, memory: MemoryPolicy | None = None, mover: MoverSpec | None = None
) -> MigrationPlan:
    """A move of one service from alpha to beta."""
    move = AddressMove(
        address="192.0.2.200", prefixlen=24, announce_at_destination=(b"at beta",), announce_at_source=(b"at alpha",)
    )
    spec = WorkloadSpec(
        name="counter",
        runtime="runc",
        addresses=("192.0.2.200/24",),
        container="c",
        bundle="/srv/c",
        mover=mover or MoverSpec(),
    )
    return MigrationPlan(
        id=ID,
        workload=spec,
        source=Endpoint(name="alpha", interface="eth0", channel_address="192.0.2.11"),
        destination=Endpoint(name="beta", interface="eth0", channel_address="192.0.2.12"),
        addresses=(move,),
        image_space_bytes=1 << 20,
        expected_pids=(100,),
        deadlines=deadlines or Deadlines(copy_s=100.0),
        memory=memory or MemoryPolicy(),
        track_connections=True,
        trees=(Tree(path="/srv/data", inside="/data", files="sync"),),
    )


def credentials() -> tuple[Credentials, Credentials]:
    """What the fake channel compares."""
    return (
        Credentials(certificate=b"source", key=b"", peer_certificate=b"destination"),
        Credentials(certificate=b"destination", key=b"", peer_certificate=b"source"),
    )


class Process:
    """An agent process on a machine, and a session with it."""

    def __init__(self, world: World, machine: Machine, segment: FakeSegment) -> None:
        self.life = Life(world, machine)
        self.lines: list[dict[str, Any]] = []
        self.calls: list[asyncio.Task[None]] = []
        self.agent = Agent(places(machine), self.lines.append, fake_parts(self.life, segment))
        self.life.at_death.append(self._close_descriptors)

    @property
    def host(self) -> Host:
        """Which host it is a session with."""
        return make_host(self.life.machine.name)

    async def call(self, request: Request[R], deadline_s: float = 1000.0) -> R:
        """Ask, as the coordinator's session does."""
        number = len(self.calls)
        line = {"id": number, "call": type(request).__name__, "params": encode(request), "deadline_s": deadline_s}
        task = asyncio.ensure_future(self.agent.handle(json.dumps(line).encode()))
        self.calls.append(task)
        await asyncio.wait((task,))
        if not task.cancelled():
            task.exception()
        answers = [answer for answer in self.lines if answer.get("id") == number]
        if self.life.dead or not answers:
            raise SessionLost(f"the session to {self.life.machine.name} was lost")
        if "error" in answers[0]:
            raise LivemoveError.from_wire(answers[0]["error"])
        return cast(R, decode(request.reply, answers[0]["reply"]))

    def cancel(self) -> None:
        """What an `Abort`, or before the run a deadline of the call, does to what is under way."""
        owned = self.agent._owned
        if owned is not None and owned.run is not None:
            owned.run.cancel()
        else:
            self.calls[-1].cancel()

    def _close_descriptors(self) -> None:
        owned = self.agent._owned
        if owned is not None:
            owned.half.journal.close()
            owned.lock.release()


def make_host(name: str) -> Host:
    """A host of the configuration."""
    return Host(
        name=name, address=name, key=Path("key"), known_hosts=Path("known"), interface="eth0", channel_address=name
    )


class Stage:
    """One migration. Set faults on `source.life`, `destination.life` and `segment` before `play`."""

    def __init__(
        self,
        folder: Path,
        deadlines: Deadlines | None = None,
        memory: MemoryPolicy | None = None,
        mover: MoverSpec | None = None,
    ) -> None:
        self.plan = make_plan(deadlines, memory, mover)
        self.world = World(folder, self.plan)
        self.segment = FakeSegment(parted=self._part)
        self.source = Process(self.world, self.world.source, self.segment)
        self.destination = Process(self.world, self.world.destination, self.segment)
        self.told: tuple[Told, Told] | None = None
        self.recovering: list[Process] = []
        #: Recovering agents are killed at this await of theirs; 0: they are not.
        self.patience = 0

    @property
    def killed(self) -> bool:
        """Whether one of the last settling's agents was killed."""
        return any(process.life.dead for process in self.recovering)

    def _part(self) -> None:
        self.world.parted = True

    async def play(self) -> tuple[Told, Told]:
        """Prepare, run and settle, in the coordinator's order. Returns what both halves said in the end."""
        self.told = await self.move()
        ends = await self.settle(self.told)
        await asyncio.sleep(1.0)  # on the fake clock: a hook that has been let go reads the journal
        return ends

    async def move(self) -> tuple[Told, Told]:
        """Prepare and run."""
        for_source, for_destination = credentials()
        try:
            ready = await self.destination.call(PrepareDestination(plan=self.plan, credentials=for_destination))
            await self.source.call(PrepareSource(plan=self.plan, credentials=for_source, port=ready.port))
        except LivemoveError as error:
            for process in (self.source, self.destination):
                try:
                    await process.call(Abort(reason=str(error)))
                except SessionLost:
                    continue
            return error, error
        ends = await asyncio.gather(*(self._run(process) for process in (self.source, self.destination)))
        return ends[0], ends[1]

    @staticmethod
    async def _run(process: Process) -> Told:
        try:
            return await process.call(RunHalf())
        except LivemoveError as error:
            return error

    async def settle(self, told: tuple[Told, Told]) -> tuple[Told, Told]:
        """What the coordinator does when a half did not say how it ended."""
        self.recovering.clear()
        hosts = {name: make_host(name) for name in ("alpha", "beta")}
        config = Configuration(path=Path("livemove.toml"), hosts=hosts, workloads={})
        return await settle(config, Move(ID, "alpha", "beta"), told, self.connect)

    @asynccontextmanager
    async def connect(self, host: Host, sink: EventSink) -> AsyncIterator[Process]:
        """A session with a new agent on that host."""
        process = Process(self.world, self.world.machine(host.name), self.segment)
        process.life.stop_at = self.patience
        self.recovering.append(process)
        yield process


def phase_of(machine: Machine) -> Phase | None:
    """The last phase in a machine's journal; None where there is none."""
    found = [read_state(path).phase for path in machine.state.glob("*/*.jsonl")]
    return found[0] if found else None


def verdict(stage: Stage) -> str:
    """`moved` or `rolled_back`; fails unless every invariant held and both hosts agree, clean up to the journals."""
    world, source, destination = stage.world, stage.world.source, stage.world.destination
    assert world.broken == []
    assert (source.remains, destination.remains) == ([], [])
    phases = {phase_of(source), phase_of(destination)}
    sent = [line for line in world.history if "frames sent" in line]
    if destination.copy == "running":
        assert source.copy == "absent"
        assert phases == {Phase.RELEASED}
        assert destination.answers
        assert destination.passes
        assert {each.original for each in destination.tracked.values()} == {CONNECTION.original}
        if world.plan.workload.mover.kind != "l2":
            assert world.way.attracting == {"destination"}
            return "moved"
        assert sent[-1].startswith(destination.name)
        assert _announced(destination)[-1] == b"at beta"
        return "moved"
    assert (source.copy, destination.copy) == ("running", "absent")
    assert phases <= {Phase.ROLLED_BACK, None}
    assert source.answers
    assert source.passes
    assert list(source.tracked.values()) == [CONNECTION]
    assert world.plan.workload.mover.kind == "l2" or world.way.attracting == {"source"}
    assert not sent or sent[-1].startswith(source.name)
    assert not sent or _announced(source)[-1] == b"at alpha"
    return "rolled_back"


def _announced(machine: Machine) -> list[bytes]:
    """What a machine has sent, without the questions whether its neighbours follow."""
    return [frame for frame in machine.port.sent if frame.startswith(b"at ")]


def told_outcomes(ends: tuple[Told, Told]) -> set[str]:
    """What the halves that could answer said."""
    return {end.outcome for end in ends if isinstance(end, HalfResult)}


def lost(stage: Stage, ends: tuple[Told, Told]) -> str:
    """`lost`; fails unless the service is down for want of its memory, in one place nowhere, and that is told.

    Only after the commit point, and only while memory is still filled in (docs/operations.md). The source may say
    `moved`, which it was; the destination must not, and so the migration as a whole is in doubt."""
    world = stage.world
    assert world.broken == []
    assert world.committed
    assert (world.source.copy, world.destination.copy) == ("absent", "absent")
    assert not world.destination.helpers
    assert not world.source.trackers
    told = ends[1]
    assert isinstance(told, HalfResult)
    assert told.outcome == "in_doubt"
    assert told.error is not None
    assert told.error["code"] == "MEMORY_LOST"
    result = migration_result(
        migration=ID,
        workload="counter",
        source_name="alpha",
        destination_name="beta",
        source=ends[0],
        destination=told,
        total_ms=0.0,
    )
    assert (result.outcome, result.exit_code) == ("in_doubt", ExitCode.IN_DOUBT)
    assert result.error is not None
    assert result.error["code"] == "MEMORY_LOST"
    return "lost"
