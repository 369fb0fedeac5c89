"""Finishing or undoing this host's part of a migration whose half is gone, from its journal alone.

The source knows by itself: COMMITTED in its journal or not. A destination that was staged does not, and is told what
the source's journal says. Both then do exactly what their half would have done.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path

from coordinator.agent.assembly import REAL_PARTS, HalfBuilder, Places
from coordinator.agent.destination import DestinationHalf
from coordinator.agent.half import uninterrupted
from coordinator.agent.source import SourceHalf
from coordinator.errors import AgentLost, InDoubt, LivemoveError, UnknownMigration, WorkloadBusy
from coordinator.events import EventSink
from coordinator.facts import SocketFacts
from coordinator.journal import FINISHED, Journal, LiveLock, Phase, has_begun, is_committed, journals, read_state
from coordinator.protocol import HalfResult, MigrationPlan, MigrationRecord, Recover, Verdict
from coordinator.wire import decode


def records(state_dir: Path) -> tuple[MigrationRecord, ...]:
    """What this host's journals say, oldest first."""
    found = []
    for path in journals(state_dir):
        state = read_state(path)
        if state.role == "coordinator":
            continue
        lock = LiveLock(path.parent, state.role)
        live = state.phase not in FINISHED and not lock.take()
        lock.release()
        found.append(
            MigrationRecord(
                id=state.migration,
                role=state.role,
                workload=state.plan["workload"]["name"],
                source=state.plan["source"]["name"],
                destination=state.plan["destination"]["name"],
                phase=state.phase,
                live=live,
                opened_at=state.opened_at,
                notes=tuple(state.notes),
            )
        )
    return tuple(found)


def unfinished(state_dir: Path, workload: str | None = None) -> tuple[str, ...]:
    """The ids of unfinished migrations on this host, of one workload or of all."""
    return tuple(
        record.id
        for record in records(state_dir)
        if record.phase not in FINISHED and workload in (None, record.workload)
    )


def holds_back(state_dir: Path, workload: str) -> bool:
    """Whether tasks of the workload that are seen on this host cannot run: restored here and not committed yet, or
    committed to another host and still frozen (I1). A runtime calls both running."""
    return any(
        is_committed(record.phase) == (record.role == "source")
        for record in records(state_dir)
        if record.workload == workload and record.phase not in FINISHED
    )


async def recover(
    places: Places, request: Recover, sink: EventSink, halves: Mapping[str, HalfBuilder] = REAL_PARTS.halves
) -> HalfResult:
    """See ``protocol.Recover``. Raises ``UnknownMigration``; ``WorkloadBusy`` if a live half does not end in time."""
    migration, verdict = request.id, request.verdict
    paths = [path for path in (places.state / migration).glob("*.jsonl") if path.stem in halves and has_begun(path)]
    if not paths:
        raise UnknownMigration(f"this host has no journal of {migration}")
    path = paths[0]
    lock = LiveLock(path.parent, "source" if path.stem == "source" else "destination")
    await _take_over(lock, request.wait_s, migration)
    try:
        journal = Journal.load(path)
        try:
            plan = decode(MigrationPlan, journal.state.plan)
            half = halves[path.stem](plan, journal, places, sink)
            try:
                return await uninterrupted(_settle(half, verdict))
            finally:
                await half.network.close()
        finally:
            journal.close()
    finally:
        lock.release()


async def _take_over(lock: LiveLock, wait_s: float, migration: str) -> None:
    loop = asyncio.get_running_loop()
    until = loop.time() + wait_s
    while not lock.take():
        if loop.time() >= until:
            raise WorkloadBusy(f"migration {migration} is still under way", "Wait for it, then run recover again.")
        await asyncio.sleep(0.1)


async def _settle(half: SourceHalf | DestinationHalf, verdict: Verdict) -> HalfResult:
    phase = half.journal.phase
    if phase in FINISHED:
        return await _finished(half)
    if phase is Phase.ABORTED:
        return await half.undo_rest(AgentLost("; ".join(half.journal.state.notes) or f"the agent on {half.host} ended"))
    if isinstance(half, SourceHalf):
        return await _settle_source(half, verdict)
    return await _settle_destination(half, verdict)


async def _finished(half: SourceHalf | DestinationHalf) -> HalfResult:
    """A half that has ended by itself, and could not tell anybody. Where the tasks run, their sockets can be seen."""
    if not is_committed(half.journal.phase):
        return half.result("rolled_back")
    sockets: tuple[SocketFacts, ...] = ()
    if isinstance(half, DestinationHalf):
        with contextlib.suppress(LivemoveError):  # nothing hangs on it, and the tasks may have gone elsewhere since
            tasks = await half.runtime.find()
            sockets = await half.network.sockets(tasks.root_pid)
    return half.result("moved", sockets=sockets)


async def _settle_source(half: SourceHalf, verdict: Verdict) -> HalfResult:
    """A committed source is released when the destination is known to run: ``verdict`` committed says just that."""
    phase = half.journal.phase
    if not is_committed(phase):
        return await half.give_up(AgentLost(f"the agent on {half.host}, the source, ended in phase {phase}"))
    if phase is Phase.COMMITTED:
        if verdict != "committed":
            return half.result("in_doubt", InDoubt(f"{half.host} has committed; the destination has to confirm"))
        half.enter(Phase.RESUMED, durable=True)
    return await half.release()


async def _settle_destination(half: DestinationHalf, verdict: Verdict) -> HalfResult:
    phase = half.journal.phase
    if is_committed(phase):
        return await half.finish()
    if phase is not Phase.STAGED or verdict == "aborted":
        return await half.give_up(AgentLost(f"the agent on {half.host}, the destination, ended in phase {phase}"))
    if verdict == "committed":
        half.enter(Phase.COMMITTED, durable=True)
        return await half.finish()
    await half.fall_silent()  # a source that has not committed answers for the addresses (I2)
    return half.result("in_doubt", InDoubt(f"{half.host} is staged and must be told what the source's journal says"))
