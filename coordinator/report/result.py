"""Result objects: plain frozen data, each with ``to_json`` (one JSON object for ``--json``) and an ``exit_code``.

``migration_result`` tells from the results of the two halves where the service is. It never guesses: what neither half
could say is in doubt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from coordinator.errors import CheckFailed, ExitCode, Interrupted, LivemoveError, MemoryLost, RestoreFailed
from coordinator.facts import SocketFacts
from coordinator.findings import Finding, errors_of
from coordinator.journal import Phase
from coordinator.protocol import HalfResult, MigrationRecord, Mode, PhaseTime, RoundResult
from coordinator.wire import encode

#: ``planned`` is the end of a dry run whose checks have passed; the others are where a migration can end.
MigrationOutcome = Literal["moved", "rolled_back", "refused", "in_doubt", "interrupted", "planned"]

_NAMED = 3
_NOT_CONNECTED = frozenset({"LISTEN", "UNCONNECTED", "CLOSE", "BOUND", "TIME_WAIT"})


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationResult:
    """How a migration ended. ``source`` is empty where it was not found out; times are milliseconds.

    ``established`` and ``restored`` count TCP connections: those of the source before, and which of them the
    destination has. ``findings`` are for people; in JSON they are ``warnings`` and ``error``.
    """

    id: str
    workload: str
    source: str
    destination: str
    outcome: MigrationOutcome
    exit_code: ExitCode
    mode: Mode = "stop-copy"
    rounds: tuple[RoundResult, ...] = ()
    phases: tuple[PhaseTime, ...] = ()
    freeze_ms: float = 0.0
    total_ms: float = 0.0
    pre_copy_bytes: int = 0
    frozen_bytes: int = 0
    established: int = 0
    restored: int = 0
    warnings: tuple[str, ...] = ()
    error: dict[str, str] | None = None
    findings: tuple[Finding, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object of ``livemove migrate --json``."""
        return {
            "id": self.id,
            "workload": self.workload,
            "source": self.source,
            "destination": self.destination,
            "outcome": self.outcome,
            "exit_code": int(self.exit_code),
            "mode": self.mode,
            "rounds": [encode(each) for each in self.rounds],
            "phases": [
                {"name": each.name, "start_ms": round(each.start_ms, 3), "ms": round(each.ms, 3)}
                for each in self.phases
            ],
            "freeze_ms": round(self.freeze_ms, 3),
            "total_ms": round(self.total_ms, 3),
            "bytes": {"pre_copy": self.pre_copy_bytes, "frozen": self.frozen_bytes},
            "connections": {"established": self.established, "restored": self.restored},
            "warnings": list(self.warnings),
            "error": self.error,
        }


def connected(sockets: Iterable[SocketFacts]) -> tuple[SocketFacts, ...]:
    """The TCP connections among the sockets."""
    return tuple(each for each in sockets if each.protocol == "tcp" and each.state not in _NOT_CONNECTED)


def missing_sockets(before: Iterable[SocketFacts], after: Iterable[SocketFacts]) -> tuple[SocketFacts, ...]:
    """The listening and connected sockets of before that are not there after, each as often as it is missing."""
    left = Counter(_ends(each) for each in after)
    missing = []
    for each in before:
        if each.state == "TIME_WAIT":
            continue
        if left[_ends(each)] > 0:
            left[_ends(each)] -= 1
        else:
            missing.append(each)
    return tuple(missing)


def _ends(socket: SocketFacts) -> tuple[str, str, int, str, int, bool]:
    """What does not change when a peer ends its side."""
    ends = (socket.protocol, socket.local, socket.local_port, socket.remote, socket.remote_port)
    return (*ends, socket.state == "LISTEN")


def describe_missing(missing: Sequence[SocketFacts], connections: int) -> list[str]:
    """Warnings: a sentence for each listener and unconnected socket, which must be there, and one for all connections,
    which may have ended by themselves since the move. ``connections`` is how many there were."""
    gone = connected(missing)
    sentences = [f"not there after the move: {describe_socket(each)}" for each in missing if each not in gone]
    if gone:
        named = ", ".join(describe_socket(each) for each in gone[:_NAMED])
        more = f" and {len(gone) - _NAMED} more" if len(gone) > _NAMED else ""
        sentences.append(f"{len(gone)} of {connections} connections have ended or are lost: {named}{more}")
    return sentences


def describe_socket(socket: SocketFacts) -> str:
    """A socket in a few words: ``tcp 192.0.2.200:7000 → 192.0.2.100:40001``."""
    remote = f" → {socket.remote}:{socket.remote_port}" if socket.remote_port else " (listening)"
    return f"{socket.protocol} {socket.local}:{socket.local_port}{remote}"


def migration_result(
    *,
    migration: str,
    workload: str,
    source_name: str,
    destination_name: str,
    source: HalfResult | LivemoveError,
    destination: HalfResult | LivemoveError,
    total_ms: float,
    mode: Mode = "stop-copy",
    findings: Sequence[Finding] = (),
    interrupted: bool = False,
    checked: Sequence[SocketFacts] = (),
) -> MigrationResult:
    """The end of a migration from what its halves said; an error in place of a half says why it could not be asked.

    ``checked`` are the workload's sockets as the checks saw them, for a source that ended unheard.
    ``moved`` is complete only if both halves were released; what neither half could say is ``in_doubt``.
    """
    halves = [half for half in (source, destination) if isinstance(half, HalfResult)]
    verdict = _verdict(source, destination)
    outcome: MigrationOutcome = "interrupted" if verdict == "rolled_back" and interrupted else verdict
    told = source if isinstance(source, HalfResult) and source.phases else next(iter(reversed(halves)), None)
    before = (source.sockets if isinstance(source, HalfResult) else ()) or tuple(checked)
    after = destination.sockets if isinstance(destination, HalfResult) else ()
    lost = missing_sockets(before, after) if verdict == "moved" and before and after else ()
    error = None if verdict == "moved" else _cause(source, destination)
    if outcome == "interrupted":
        error = Interrupted(f"the move of {workload} was interrupted; it runs on {source_name}").to_wire()
    warnings = [
        *_warnings_of(findings),
        *(warning for half in halves for warning in half.warnings),
        *(f"{destination_name}: {sentence}" for sentence in describe_missing(lost, len(connected(before)))),
    ]
    if verdict == "moved":
        for name, half in ((source_name, source), (destination_name, destination)):
            warnings += _incomplete(name, half)
    return MigrationResult(
        id=migration,
        workload=workload,
        source=source_name,
        destination=destination_name,
        outcome=outcome,
        exit_code=_exit_code(outcome, halves),
        phases=told.phases if told else (),
        freeze_ms=max((half.freeze_ms for half in halves), default=0.0),
        total_ms=total_ms,
        frozen_bytes=max((half.frozen_bytes for half in halves), default=0),
        mode=told.mode if told and told.mode else mode,
        rounds=told.rounds if told else (),
        pre_copy_bytes=max((half.pre_copy_bytes for half in halves), default=0),
        established=len(connected(before)),
        restored=len(connected(before)) - len(connected(missing_sockets(before, after))),
        warnings=tuple(warnings),
        error=error,
        findings=tuple(findings),
    )


#: What a destination says of tasks that do not run there, whatever the source has heard before.
_GONE = (MemoryLost.code, RestoreFailed.code)


def _verdict(
    source: HalfResult | LivemoveError, destination: HalfResult | LivemoveError
) -> Literal["moved", "rolled_back", "in_doubt"]:
    """Where the service is. Each half says ``moved`` only when the tasks run on the destination, so one word is enough
    for that; that they run on the source only the source can say. Halves that contradict each other leave it open, and
    so does a destination whose tasks ran and are gone: they were killed for want of their memory."""
    here = source.outcome if isinstance(source, HalfResult) else "in_doubt"
    there = destination.outcome if isinstance(destination, HalfResult) else "in_doubt"
    said = (destination.error or {}).get("code") if isinstance(destination, HalfResult) else None
    if there == "in_doubt" and here != "rolled_back" and said in _GONE:
        return "in_doubt"
    if "moved" in (here, there) and "rolled_back" not in (here, there):
        return "moved"
    return "rolled_back" if here == "rolled_back" and there != "moved" else "in_doubt"


def _exit_code(outcome: MigrationOutcome, halves: Sequence[HalfResult]) -> ExitCode:
    if outcome == "moved":
        complete = len(halves) == 2 and all(half.phase is Phase.RELEASED for half in halves)
        return ExitCode.MOVED if complete else ExitCode.CLEANUP_INCOMPLETE
    return {
        "rolled_back": ExitCode.ROLLED_BACK,
        "interrupted": ExitCode.INTERRUPTED,
        "in_doubt": ExitCode.IN_DOUBT,
    }[outcome]


def _incomplete(name: str, half: HalfResult | LivemoveError) -> list[str]:
    if isinstance(half, LivemoveError):
        return [f"{name}: whether it was cleaned up is unknown: {half.message}"]
    if half.phase is not Phase.RELEASED:
        reason = f": {half.error['message']}" if half.error else ""
        return [f"{name}: not cleaned up, its journal ends with {half.phase}{reason}"]
    return []


def _cause(*halves: HalfResult | LivemoveError) -> dict[str, str] | None:
    """The error that came first: not one that only says that the other side gave up, or is not heard of any more."""
    errors = [half.to_wire() if isinstance(half, LivemoveError) else half.error for half in halves]
    given = [error for error in errors if error is not None]
    own = [error for error in given if error["code"] not in ("PEER_ABORTED", "SESSION_LOST")]
    causes = [error for error in own if error["code"] != "CHANNEL_FAILED"]
    gone = [error for error in causes if error["code"] == MemoryLost.code]
    return next(iter(gone or causes or own or given), None)


def _warnings_of(findings: Iterable[Finding]) -> tuple[str, ...]:
    return tuple(each.sentence for each in findings if each.severity == "warning")


def refused_result(
    *,
    migration: str,
    workload: str,
    source: str,
    destination: str,
    findings: Sequence[Finding],
) -> MigrationResult:
    """A move that its checks forbid. The error has the first finding's code and hint, and the messages of all."""
    errors = errors_of(findings)
    return MigrationResult(
        id=migration,
        workload=workload,
        source=source,
        destination=destination,
        outcome="refused",
        exit_code=ExitCode.REFUSED,
        warnings=_warnings_of(findings),
        error={
            "code": errors[0].code if errors else CheckFailed.code,
            "message": "; ".join(each.sentence for each in errors),
            "hint": errors[0].hint if errors else CheckFailed.default_hint,
        },
        findings=tuple(findings),
    )


def planned_result(
    *,
    migration: str,
    workload: str,
    source: str,
    destination: str,
    findings: Sequence[Finding],
) -> MigrationResult:
    """The end of a dry run: nothing forbids the move."""
    return MigrationResult(
        id=migration,
        workload=workload,
        source=source,
        destination=destination,
        outcome="planned",
        exit_code=ExitCode.MOVED,
        warnings=_warnings_of(findings),
        findings=tuple(findings),
    )


def error_json(error: LivemoveError) -> dict[str, Any]:
    """What a command that ended in an error prints with ``--json``."""
    outcome = {
        ExitCode.USAGE: "usage",
        ExitCode.ROLLED_BACK: "rolled_back",
        ExitCode.IN_DOUBT: "in_doubt",
        ExitCode.INTERRUPTED: "interrupted",
    }.get(error.exit_code, "refused")
    return {"outcome": outcome, "exit_code": int(error.exit_code), "error": error.to_wire()}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadStatus:
    """Where a workload runs: on one host if all is well; ``stopped_on`` has it without running it."""

    name: str
    running_on: tuple[str, ...]
    stopped_on: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMigration:
    """An unfinished migration as the journal of ``host`` has it."""

    host: str
    record: MigrationRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusReport:
    """Where each workload runs, what is unfinished, and which hosts could not be asked (name → error)."""

    workloads: tuple[WorkloadStatus, ...]
    unfinished: tuple[HostMigration, ...] = ()
    unreachable: dict[str, dict[str, str]]

    @property
    def exit_code(self) -> ExitCode:
        """``REFUSED`` if a host could not be asked: the report is then not the whole truth."""
        return ExitCode.REFUSED if self.unreachable else ExitCode.MOVED

    def to_json(self) -> dict[str, Any]:
        """The object of ``livemove status --json``."""
        return {
            "exit_code": int(self.exit_code),
            "workloads": [encode(each) for each in self.workloads],
            "unfinished": [{"host": each.host, **encode(each.record)} for each in self.unfinished],
            "unreachable": self.unreachable,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryResult:
    """Where a recovered migration ended. ``phases`` is the last phase of each journal that was read, by host."""

    id: str
    workload: str
    source: str
    destination: str
    outcome: Literal["moved", "rolled_back", "in_doubt"]
    exit_code: ExitCode
    phases: dict[str, Phase]
    warnings: tuple[str, ...] = ()
    error: dict[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """The object of ``livemove recover --json``."""
        return {**encode(self), "exit_code": int(self.exit_code)}
