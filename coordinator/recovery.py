"""After a crash, a lost session or a lost agent: ask both hosts what their journals say, and finish or undo.

The source is asked first, because its journal holds the commit point. What it says is the verdict for the destination,
and that the destination runs is what lets a committed source clean up. Nothing is decided by guessing.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TypeVar

from coordinator.config import Configuration
from coordinator.errors import (
    ExitCode,
    HostUnreachable,
    InDoubt,
    LivemoveError,
    SessionLost,
    UnknownMigration,
)
from coordinator.events import Event, EventSink
from coordinator.facts import WorkloadSpec
from coordinator.journal import FINISHED, is_committed
from coordinator.protocol import (
    DescribeWorkload,
    HalfResult,
    ListMigrations,
    MigrationRecord,
    Recover,
    Request,
    Verdict,
)
from coordinator.report.result import (
    HostMigration,
    RecoveryResult,
    StatusReport,
    WorkloadStatus,
    migration_result,
)
from coordinator.sessions import SessionFactory, Sessions, open_sessions
from coordinator.ssh import connect as ssh_connect

LIST_S = 20.0
#: How long a half that still runs may take to end, before it is left alone. Longer than any of its own deadlines in
#: ordinary use; a recovery can be repeated.
WAIT_S = 90.0
RECONNECT_TRIES, RECONNECT_PAUSE_S = 5, 1.0

Told = HalfResult | LivemoveError
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Move:
    """A migration by its id, and the hosts it is between, by name."""

    id: str
    source: str
    destination: str


async def settle(
    config: Configuration, move: Move, told: tuple[Told, Told], connect: SessionFactory
) -> tuple[Told, Told]:
    """Bring two halves of which one at least did not say how it ended to one outcome. Returns both, as known then."""
    at_source, at_destination = told
    if _is_clear(at_source) and _is_clear(at_destination):
        return told
    if not _is_clear(at_source):
        at_source = await _recover_at(config, move.source, move.id, "unknown", connect)
    if not _is_clear(at_destination):
        at_destination = await _recover_at(config, move.destination, move.id, _verdict_of(at_source), connect)
    if not _is_clear(at_source) and _outcome(at_destination) == "moved":
        at_source = await _recover_at(config, move.source, move.id, "committed", connect)
    return at_source, at_destination


def _is_clear(told: Told) -> bool:
    """Whether a half said how it ended, and has cleaned up."""
    return isinstance(told, HalfResult) and told.phase in FINISHED


def _outcome(told: Told) -> str:
    return told.outcome if isinstance(told, HalfResult) else "in_doubt"


def _verdict_of(source: Told) -> Verdict:
    """What the source's journal says. A source that never began has not committed either."""
    if isinstance(source, HalfResult):
        return "committed" if is_committed(source.phase) else "aborted"
    return "aborted" if isinstance(source, UnknownMigration) else "unknown"


async def _recover_at(
    config: Configuration, host: str, migration: str, verdict: Verdict, connect: SessionFactory
) -> Told:
    """Ask a host to finish or undo its part, over a session of its own; try again for a while if it is unreachable."""
    error: LivemoveError = HostUnreachable(host)
    for attempt in range(RECONNECT_TRIES):
        if attempt:
            await asyncio.sleep(RECONNECT_PAUSE_S)
        try:
            async with connect(config.host(host), _ignore) as session:
                return await session.call(Recover(id=migration, verdict=verdict, wait_s=WAIT_S), WAIT_S * 2)
        except (HostUnreachable, SessionLost) as lost:
            error = lost
        except LivemoveError as refused:
            return refused
    return error


def _ignore(_: Event) -> None:
    """Events of a recovery are told by its result."""


async def recover(
    config: Configuration, migration: str, sink: EventSink, connect: SessionFactory = ssh_connect
) -> RecoveryResult:
    """Finish or undo a migration, whatever state it was left in. Harmless to repeat.

    Raises ``UnknownMigration`` if no host that can be reached knows it."""
    async with open_sessions(config.hosts.values(), connect, sink) as sessions:
        failed = dict(sessions.failed)
        records = await _records(sessions, failed)
    known = {host: record for host, record in records if record.id == migration}
    if not known:
        missing = f"; not reachable: {', '.join(failed)}" if failed else ""
        raise UnknownMigration(f"no host knows a migration {migration}{missing}")
    record = next(iter(known.values()))
    doubt = InDoubt(f"migration {migration} is unfinished")
    source, destination = await settle(
        config, Move(migration, record.source, record.destination), (doubt, doubt), connect
    )
    if isinstance(destination, UnknownMigration) and _outcome(source) == "rolled_back":
        destination = source  # it had not been reached yet: there is nothing to undo
    if isinstance(source, UnknownMigration) and _outcome(destination) == "rolled_back":
        source = destination
    result = migration_result(
        migration=migration,
        workload=record.workload,
        source_name=record.source,
        destination_name=record.destination,
        source=source,
        destination=destination,
        total_ms=0.0,
    )
    outcome = result.outcome if result.outcome in ("moved", "rolled_back") else "in_doubt"
    halves = {record.source: source, record.destination: destination}
    return RecoveryResult(
        id=migration,
        workload=record.workload,
        source=record.source,
        destination=record.destination,
        outcome=outcome,
        # Going back is what was asked for here, where it is due: a recovery that ends clean has succeeded.
        exit_code=ExitCode.MOVED if outcome == "rolled_back" else result.exit_code,
        phases={name: told.phase for name, told in halves.items() if isinstance(told, HalfResult)},
        warnings=result.warnings,
        error=None if outcome == "rolled_back" else result.error,
    )


async def status(config: Configuration, connect: SessionFactory = ssh_connect) -> StatusReport:
    """Where each workload runs, what is unfinished, and which hosts could not be asked."""
    async with open_sessions(config.hosts.values(), connect, _ignore) as sessions:
        failed = dict(sessions.failed)
        workloads = [await _where(spec, sessions, failed) for spec in config.workloads.values()]
        records = await _records(sessions, failed)
    return StatusReport(
        workloads=tuple(workloads),
        unfinished=tuple(HostMigration(host=host, record=r) for host, r in records if r.phase not in FINISHED),
        unreachable={name: error.to_wire() for name, error in failed.items()},
    )


async def _where(workload: WorkloadSpec, sessions: Sessions, failed: dict[str, LivemoveError]) -> WorkloadStatus:
    facts = await _ask_all(sessions, DescribeWorkload(workload=workload), failed)
    by_state = {
        state: tuple(host for host, fact in facts.items() if fact.state == state) for state in ("running", "stopped")
    }
    return WorkloadStatus(name=workload.name, running_on=by_state["running"], stopped_on=by_state["stopped"])


async def _records(sessions: Sessions, failed: dict[str, LivemoveError]) -> list[tuple[str, MigrationRecord]]:
    replies = await _ask_all(sessions, ListMigrations(), failed)
    return [(host, record) for host, reply in replies.items() for record in reply.records]


async def _ask_all(sessions: Sessions, request: Request[R], failed: dict[str, LivemoveError]) -> dict[str, R]:
    """The replies of all hosts; one that fails to answer goes into ``failed``."""
    names = list(sessions.open)
    calls = (session.call(request, LIST_S) for session in sessions.open.values())
    replies: dict[str, R] = {}
    for name, reply in zip(names, await asyncio.gather(*calls, return_exceptions=True), strict=True):
        if isinstance(reply, LivemoveError):
            failed[name] = reply
        elif isinstance(reply, BaseException):
            raise reply
        else:
            replies[name] = reply
    return replies
