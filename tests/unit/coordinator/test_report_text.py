"""What people see: progress, and reports as text."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from coordinator.errors import ExitCode, SessionLost
from coordinator.events import Event
from coordinator.fakes import healthy_facts
from coordinator.findings import finding
from coordinator.journal import Phase
from coordinator.protocol import MigrationRecord, PhaseTime, SelfTestResult
from coordinator.report import text
from coordinator.report.checks import CheckReport, DoctorReport, HostReport
from coordinator.report.result import (
    HostMigration,
    MigrationResult,
    RecoveryResult,
    StatusReport,
    WorkloadStatus,
    refused_result,
)
from coordinator.report.terminal import ProgressState, Terminal, line_of

FINDING = finding("CRIU_MISSING", "beta", "no criu in the PATH [x]")


def console(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=60, force_terminal=terminal, color_system=None, legacy_windows=False)


def written(where: Console) -> str:
    assert isinstance(where.file, io.StringIO)
    return where.file.getvalue()


def event(kind: Any, name: str, at_ms: float = 0.0, **more: Any) -> Event:
    return Event(kind=kind, name=name, host=more.pop("host", "alpha"), at_ms=at_ms, **more)


SENDING = event("progress", "images", 5.0, done=1 << 20, total=4 << 20, unit="bytes")
SENT = event("progress", "images", 6.0, done=4 << 20, total=4 << 20, unit="bytes")
NOTICE = event("notice", "WARNING", detail="the address was not taken back", hint="look at it")


@pytest.mark.parametrize(
    ("what", "verbose", "expected"),
    [
        (event("phase", "FROZEN", 12.4), False, "alpha: frozen at 12 ms"),
        (event("phase", "ABORTED", 12.4, detail="DUMP_FAILED: no"), False, "alpha: aborted at 12 ms: DUMP_FAILED: no"),
        (NOTICE, False, "alpha: warning: the address was not taken back → look at it"),
        (SENDING, False, None),
        (SENT, False, "alpha: images 4.0 of 4.0 MiB"),
        (event("progress", "files", done=4 << 20, unit="bytes"), False, None),
        (event("step", "connect", state="started"), False, None),
        (event("step", "connect", state="started"), True, "alpha: connect started"),
        (event("step", "connect", state="failed", detail="no route"), True, "alpha: connect failed: no route"),
    ],
)
def test_events_as_lines(what: Event, verbose: bool, expected: str | None) -> None:
    assert line_of(what, verbose=verbose) == expected


def test_phases_have_the_time_until_the_next_one_and_the_first_to_enter_counts() -> None:
    state = ProgressState()
    for each in (
        event("phase", "PREPARED", 1.0),
        event("phase", "PREPARED", 3.0, host="beta"),
        event("phase", "COPYING", 11.0),
        SENDING,
    ):
        state.take(each)
    assert state.spans() == [("PREPARED", 10.0), ("COPYING", None)]
    shown = state.display().plain
    assert shown.startswith("prepared 10 ms copying… diverted ")
    assert "images 1.0 of 4.0 MiB" in shown
    state.take(SENT)
    assert "images" not in state.display().plain
    state.take(event("progress", "files", done=4 << 20, unit="bytes"))
    assert "files 4.0 MiB" in state.display().plain


def test_steps_are_shown_while_they_last() -> None:
    state = ProgressState()
    state.take(event("step", "connect", state="started"))
    assert "alpha: connect" in state.display().plain
    state.take(event("step", "connect"))
    assert state.display().plain == ""


def test_plain_lines_where_there_is_no_terminal() -> None:
    where = console()
    with Terminal(where) as terminal:
        terminal(event("phase", "FROZEN", 12.4))
        terminal(NOTICE)
    assert written(where).splitlines() == ["alpha: frozen at 12 ms", line_of(NOTICE, verbose=False)]


def test_nothing_when_quiet() -> None:
    where = console(terminal=True)
    with Terminal(where, quiet=True) as terminal:
        terminal(NOTICE)
        terminal.say("x")
    assert written(where) == ""


def test_a_terminal_shows_notices_above_the_display() -> None:
    where = console(terminal=True)
    with Terminal(where) as terminal:
        terminal(event("phase", "FROZEN", 12.4))
        terminal(NOTICE)
    assert "the address was not taken back" in written(where)


def result(**changes: Any) -> MigrationResult:
    whole: dict[str, Any] = {
        "id": "i",
        "workload": "counter",
        "source": "alpha",
        "destination": "beta",
        "outcome": "moved",
        "exit_code": ExitCode.MOVED,
        "phases": (PhaseTime(name="FROZEN", start_ms=0.0, ms=1.0),),
        "freeze_ms": 150.4,
        "established": 20,
        "restored": 20,
    }
    return MigrationResult(**{**whole, **changes})


def shown(show: Any, report: Any) -> str:
    where = console()
    show(report, where)
    return written(where)


def test_a_move_as_text() -> None:
    said = shown(text.show_migration, result(warnings=("beta: careful",)))
    assert "counter alpha → beta: moved (i)" in said
    assert "frozen 150 ms" in said
    assert "20 of 20 connections restored" in said
    assert "beta: careful" in said


def test_a_roll_back_as_text_says_why() -> None:
    error = SessionLost("gone").to_wire()
    said = shown(text.show_migration, result(outcome="rolled_back", exit_code=ExitCode.ROLLED_BACK, error=error))
    assert "rolled back" in said
    assert "SESSION_LOST: gone" in said


def test_a_refusal_as_text_names_each_finding_once() -> None:
    refused = refused_result(migration="i", workload="counter", source="alpha", destination="beta", findings=[FINDING])
    assert shown(text.show_migration, refused).count("no criu in the PATH [x]") == 1


def test_doctor_and_check_as_text() -> None:
    good = HostReport(
        name="alpha", findings=(), facts=healthy_facts(11), self_test=SelfTestResult(ok=True, dump_ms=9.0)
    )
    said = shown(text.show_doctor, DoctorReport(hosts=(good, HostReport(name="beta", findings=(FINDING,)))))
    assert "CRIU 4.2.1" in said
    assert "dumped in 9 ms" in said
    assert "error   CRIU_MISSING beta: no criu in the PATH [x]" in said
    assert f"→ {FINDING.hint}" in said
    check = CheckReport(workload="counter", source="alpha", destination="beta", findings=())
    assert "nothing forbids the move" in shown(text.show_check, check)


def test_status_and_recovery_as_text() -> None:
    record = MigrationRecord(
        id="i",
        role="source",
        workload="counter",
        source="a",
        destination="b",
        phase=Phase.STAGED,
        live=False,
        opened_at=1.0,
    )
    report = StatusReport(
        workloads=(WorkloadStatus(name="counter", running_on=("alpha",)),),
        unfinished=(HostMigration(host="alpha", record=record),),
        unreachable={"gamma": SessionLost("gone").to_wire()},
    )
    said = shown(text.show_status, report)
    assert "livemove recover i" in said
    assert "gamma: gone" in said
    recovered = RecoveryResult(
        id="i",
        workload="counter",
        source="a",
        destination="b",
        outcome="in_doubt",
        exit_code=ExitCode.IN_DOUBT,
        phases={"a": Phase.STAGED},
        warnings=("w",),
        error=SessionLost("gone").to_wire(),
    )
    assert "in doubt" in shown(text.show_recovery, recovered)
