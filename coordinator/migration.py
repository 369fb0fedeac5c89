"""The story of one migration, as the coordinator sees it.

It prepares, watches and records. The switch-over itself is between the two agents: once both halves run, nothing here
decides the outcome, and a coordinator that dies in the middle leaves a migration that ends by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from coordinator.announcing import announcement_frames, probe_frames
from coordinator.config import Configuration
from coordinator.credentials import mint
from coordinator.doctor import Survey, survey
from coordinator.errors import Interrupted, LivemoveError
from coordinator.events import Event, EventSink
from coordinator.findings import from_error
from coordinator.journal import Journal, Phase
from coordinator.plan import make_plan, migration_id
from coordinator.protocol import Abort, HalfResult, MigrationPlan, PrepareDestination, PrepareSource, RunHalf
from coordinator.recovery import Move, settle
from coordinator.report.result import MigrationResult, migration_result, planned_result, refused_result
from coordinator.sessions import Session, SessionFactory, open_sessions
from coordinator.ssh import connect as ssh_connect
from coordinator.wire import encode

ABORT_S = 10.0

#: How a half ended, or why it could not be asked.
Told = HalfResult | LivemoveError


async def migrate(
    config: Configuration,
    workload: str,
    to: str,
    *,
    dry_run: bool,
    sink: EventSink,
    connect: SessionFactory = ssh_connect,
) -> MigrationResult:
    """Check, move, verify. Cancelling it rolls back, unless the commit point is passed; the result says which.

    Raises ``UnknownWorkload`` and ``UnknownHost`` before anything is contacted, ``Interrupted`` if cancelled before
    anything was changed."""
    spec, destination = config.workload(workload), config.host(to)
    began = time.monotonic()
    migration = migration_id(workload, datetime.now(UTC), secrets.token_hex(2))
    names = {"migration": migration, "workload": workload, "destination": to}
    async with open_sessions(config.hosts.values(), connect, sink) as sessions:
        found = await survey(config, spec, destination, sessions, probe_frames)
        if found.errors or found.source is None:
            return refused_result(**names, source=found.source or "", findings=found.findings)
        if dry_run:
            return planned_result(**names, source=found.source, findings=found.findings)
        plan = _plan(config, found, migration)
        with _recorded(plan, sink) as record:
            try:
                ends = await _uninterrupted(sessions.open[found.source], sessions.open[to], plan, record.sink)
            except LivemoveError as error:
                # Raised while preparing only: nothing was diverted or frozen, and what was prepared is undone.
                record.end(Phase.ROLLED_BACK, str(error))
                if isinstance(error, Interrupted):
                    raise
                findings = (*found.findings, from_error(found.source, error))
                return refused_result(**names, source=found.source, findings=findings)
            source, target = await settle(
                config, Move(plan.id, found.source, to), (ends.source, ends.destination), connect
            )
            result = migration_result(
                migration=migration,
                workload=workload,
                source_name=found.source,
                destination_name=to,
                source=source,
                destination=target,
                total_ms=round((time.monotonic() - began) * 1000, 3),
                findings=found.findings,
                interrupted=ends.interrupted,
                checked=found.facts.workloads[found.source].sockets,
            )
            record.close(result)
            return result


def _plan(config: Configuration, found: Survey, migration: str) -> MigrationPlan:
    facts = found.facts
    assert facts.source is not None, "a survey without errors has found the source"
    return make_plan(
        migration=migration,
        workload=facts.workload,
        policy=config.policy,
        source=config.host(facts.source),
        destination=config.host(facts.destination),
        source_facts=facts.hosts[facts.source],
        destination_facts=facts.hosts[facts.destination],
        workload_facts=facts.workloads[facts.source],
        frames=announcement_frames,
        probes=probe_frames,
    )


@dataclass(frozen=True, slots=True)
class _Ends:
    """How the two halves ended, and whether the operator had interrupted."""

    source: Told
    destination: Told
    interrupted: bool


async def _uninterrupted(source: Session, destination: Session, plan: MigrationPlan, sink: EventSink) -> _Ends:
    """Drive the halves in a task of its own: a cancellation becomes a request to the source half, which alone knows
    whether it comes in time, and its answer is waited for."""
    interrupt = asyncio.Event()
    work = asyncio.ensure_future(_drive(source, destination, plan, interrupt))
    while True:
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            if work.cancelled():
                raise
            interrupt.set()
            sink(Event(kind="notice", name="INTERRUPTED", host="", at_ms=0.0, detail="asking the source to go back"))


async def _drive(source: Session, destination: Session, plan: MigrationPlan, interrupt: asyncio.Event) -> _Ends:
    deadlines = plan.deadlines
    for_source, for_destination = mint(plan.id)
    prepared = PrepareDestination(plan=plan, credentials=for_destination)
    ready = await destination.call(prepared, deadlines.prepare_s)
    try:
        prepare = PrepareSource(plan=plan, credentials=for_source, port=ready.port)
        await source.call(prepare, deadlines.prepare_s)
        if interrupt.is_set():
            raise Interrupted(f"interrupted before the move of {plan.workload.name} began", "Nothing was changed.")
    except LivemoveError as error:
        for half in (source, destination):
            await _ask_to_abort(half, str(error))
        raise
    whole_s = sum(encode(deadlines).values())
    runs = [asyncio.ensure_future(_run(half, whole_s)) for half in (source, destination)]
    watcher = asyncio.ensure_future(_abort_when(interrupt, source))
    try:
        ended = await asyncio.gather(*runs)
    finally:
        watcher.cancel()
    return _Ends(ended[0], ended[1], interrupt.is_set())


async def _run(half: Session, deadline_s: float) -> Told:
    try:
        return await half.call(RunHalf(), deadline_s)
    except LivemoveError as error:
        return error


async def _abort_when(interrupt: asyncio.Event, source: Session) -> None:
    await interrupt.wait()
    await _ask_to_abort(source, "interrupted by the operator")


async def _ask_to_abort(half: Session, reason: str) -> None:
    """A half that cannot be asked has no session any more, and undoes by itself what was only prepared. One that does
    not answer in time or fails must not keep the other from being asked."""
    with contextlib.suppress(LivemoveError):
        await half.call(Abort(reason=reason), ABORT_S)


class _Record:
    """The coordinator's own journal: what it was told of the migration, for who looks at it when a host is down."""

    def __init__(self, journal: Journal, plan: MigrationPlan, sink: EventSink) -> None:
        self._journal = journal
        self._plan = plan
        self._forward = sink

    def sink(self, event: Event) -> None:
        """Record the phases of the source half, and pass every event on."""
        if event.kind == "phase" and event.host == self._plan.source.name:
            self._journal.observe(Phase(event.name))
        self._forward(event)

    def end(self, phase: Phase, note: str) -> None:
        """Record where it ended."""
        self._journal.observe(phase, note)

    def close(self, result: MigrationResult) -> None:
        """Record where it ended, if that is known."""
        last = {"moved": Phase.RELEASED, "rolled_back": Phase.ROLLED_BACK, "interrupted": Phase.ROLLED_BACK}
        if result.outcome in last:
            self.end(last[result.outcome], result.outcome)


@contextlib.contextmanager
def _recorded(plan: MigrationPlan, sink: EventSink) -> Iterator[_Record]:
    journal = Journal.create(coordinator_state_dir(), plan.id, "coordinator", encode(plan))
    try:
        yield _Record(journal, plan, sink)
    finally:
        journal.close()


def coordinator_state_dir() -> Path:
    """Where the coordinator's journals are: ``$XDG_STATE_HOME/livemove`` (XDG Base Directory Specification)."""
    home = os.environ.get("XDG_STATE_HOME") or str(Path("~/.local/state").expanduser())
    return Path(home) / "livemove"
