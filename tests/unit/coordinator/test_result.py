"""Result objects: where the service is, from what the halves said, and the exact fields of the JSON objects."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from coordinator.errors import DumpFailed, ExitCode, HostUnreachable, LivemoveError, PeerAborted, SessionLost
from coordinator.facts import SocketFacts
from coordinator.fakes import healthy_facts
from coordinator.findings import finding
from coordinator.journal import Phase
from coordinator.protocol import HalfResult, MigrationRecord, PhaseTime, RoundResult, SelfTestResult
from coordinator.report.checks import CheckReport, DoctorReport, HostReport
from coordinator.report.result import (
    HostMigration,
    MigrationResult,
    RecoveryResult,
    StatusReport,
    WorkloadStatus,
    describe_missing,
    error_json,
    migration_result,
    missing_sockets,
    planned_result,
    refused_result,
)
from tests.unit.coordinator.samples import tcp

SOCKETS = (tcp(), tcp(remote="192.0.2.100", remote_port=40001), tcp(remote="192.0.2.100", remote_port=40002))
PHASES = (PhaseTime(name="PREPARED", start_ms=1.0, ms=2.00049), PhaseTime(name="COPYING", start_ms=3.0, ms=4.0))
SOURCE = HalfResult(
    outcome="moved", phase=Phase.RELEASED, phases=PHASES, freeze_ms=150.0, frozen_bytes=1000, sockets=SOCKETS
)
DESTINATION = HalfResult(outcome="moved", phase=Phase.RELEASED, frozen_bytes=1000, sockets=SOCKETS, root_pid=7)
LOST = SessionLost("the session to beta was lost")
NAMES: dict[str, Any] = {"migration": "20261120T061500-counter-3f9a", "workload": "counter"}
WARNING = finding("MTU_DIFFERS", "beta", "eth0 has 9000, alpha's eth0 1500")


def back(phase: Phase, error: LivemoveError | None = None) -> HalfResult:
    return HalfResult(outcome="rolled_back", phase=phase, error=error.to_wire() if error else None)


def doubt(phase: Phase) -> HalfResult:
    return HalfResult(outcome="in_doubt", phase=phase)


def ended(
    source: HalfResult | LivemoveError = SOURCE, destination: HalfResult | LivemoveError = DESTINATION, **more: Any
) -> MigrationResult:
    return migration_result(
        **NAMES,
        source_name="alpha",
        destination_name="beta",
        source=source,
        destination=destination,
        total_ms=900.0,
        **more,
    )


@pytest.mark.parametrize(
    ("source", "destination", "outcome", "exit_code"),
    [
        (SOURCE, DESTINATION, "moved", ExitCode.MOVED),
        (replace(SOURCE, phase=Phase.RESUMED), DESTINATION, "moved", ExitCode.CLEANUP_INCOMPLETE),
        (SOURCE, replace(DESTINATION, phase=Phase.RESUMED), "moved", ExitCode.CLEANUP_INCOMPLETE),
        (SOURCE, LOST, "moved", ExitCode.CLEANUP_INCOMPLETE),
        (LOST, DESTINATION, "moved", ExitCode.CLEANUP_INCOMPLETE),
        (doubt(Phase.COMMITTED), DESTINATION, "moved", ExitCode.CLEANUP_INCOMPLETE),
        (doubt(Phase.COMMITTED), doubt(Phase.STAGED), "in_doubt", ExitCode.IN_DOUBT),
        (doubt(Phase.COMMITTED), LOST, "in_doubt", ExitCode.IN_DOUBT),
        (LOST, doubt(Phase.STAGED), "in_doubt", ExitCode.IN_DOUBT),
        (LOST, LOST, "in_doubt", ExitCode.IN_DOUBT),
        (LOST, back(Phase.ROLLED_BACK), "in_doubt", ExitCode.IN_DOUBT),
        (back(Phase.ROLLED_BACK), back(Phase.ROLLED_BACK), "rolled_back", ExitCode.ROLLED_BACK),
        (back(Phase.ROLLED_BACK), LOST, "rolled_back", ExitCode.ROLLED_BACK),
        (back(Phase.ROLLED_BACK), doubt(Phase.STAGED), "rolled_back", ExitCode.ROLLED_BACK),
        (back(Phase.ROLLED_BACK), DESTINATION, "in_doubt", ExitCode.IN_DOUBT),
        (SOURCE, back(Phase.ROLLED_BACK), "in_doubt", ExitCode.IN_DOUBT),
    ],
)
def test_where_the_service_is(
    source: HalfResult | LivemoveError, destination: HalfResult | LivemoveError, outcome: str, exit_code: ExitCode
) -> None:
    result = ended(source, destination)
    assert (result.outcome, result.exit_code) == (outcome, exit_code)
    if exit_code is ExitCode.CLEANUP_INCOMPLETE:
        assert result.warnings


def test_the_json_object_of_a_move_has_exactly_these_fields() -> None:
    told = ended(findings=[WARNING]).to_json()
    assert told == {
        "id": "20261120T061500-counter-3f9a",
        "workload": "counter",
        "source": "alpha",
        "destination": "beta",
        "outcome": "moved",
        "exit_code": 0,
        "mode": "stop-copy",
        "rounds": [],
        "phases": [
            {"name": "PREPARED", "start_ms": 1.0, "ms": 2.0},
            {"name": "COPYING", "start_ms": 3.0, "ms": 4.0},
        ],
        "freeze_ms": 150.0,
        "total_ms": 900.0,
        "bytes": {"pre_copy": 0, "frozen": 1000},
        "connections": {"established": 2, "restored": 2},
        "warnings": ["beta: eth0 has 9000, alpha's eth0 1500"],
        "error": None,
    }
    assert json.loads(json.dumps(told)) == told


def test_all_outcomes_have_the_same_fields() -> None:
    names = {**NAMES, "source": "alpha", "destination": "beta"}
    results = [
        ended(),
        ended(LOST, LOST),
        refused_result(**names, findings=[finding("CRIU_MISSING", "beta", "no criu")]),
        planned_result(**names, findings=[]),
    ]
    assert len({tuple(result.to_json()) for result in results}) == 1


def test_rounds_have_the_fields_of_the_contract() -> None:
    (told,) = replace(ended(), rounds=(RoundResult(n=1, pages=2, bytes=8192, ms=1.5),)).to_json()["rounds"]
    assert told == {"n": 1, "pages": 2, "bytes": 8192, "ms": 1.5}


def test_an_interrupted_move_is_told_as_such_only_if_it_went_back() -> None:
    result = ended(back(Phase.ROLLED_BACK), back(Phase.ROLLED_BACK), interrupted=True)
    assert (result.outcome, result.exit_code) == ("interrupted", ExitCode.INTERRUPTED)
    assert result.error is not None
    assert result.error["code"] == "INTERRUPTED"
    assert ended(interrupted=True).outcome == "moved"


def test_the_error_is_the_cause_and_not_what_followed_from_it() -> None:
    first, second = DumpFailed("criu dump: no"), PeerAborted("the source gave up")
    for halves in ((first, second), (second, first)):
        result = ended(back(Phase.ROLLED_BACK, halves[0]), back(Phase.ROLLED_BACK, halves[1]))
        assert result.error == first.to_wire()
    assert ended(back(Phase.ROLLED_BACK), LOST).error == LOST.to_wire()


def test_sockets_that_are_not_there_after_the_move_are_named() -> None:
    result = ended(destination=replace(DESTINATION, sockets=SOCKETS[:2]))
    assert (result.established, result.restored) == (2, 1)
    gone = "tcp 192.0.2.200:7000 → 192.0.2.100:40002"
    assert result.warnings == (f"beta: 1 of 2 connections have ended or are lost: {gone}",)


def test_a_listener_has_to_be_there_and_many_connections_are_one_warning() -> None:
    listener = replace(tcp(), state="LISTEN", remote="0.0.0.0", remote_port=0)
    connections = [tcp(remote="192.0.2.9", remote_port=port) for port in range(1, 6)]
    first, second = describe_missing([listener, *connections], 7)
    assert first == "not there after the move: tcp 192.0.2.200:7000 (listening)"
    assert second.startswith("5 of 7 connections have ended or are lost: tcp 192.0.2.200:7000 → 192.0.2.9:1, ")
    assert second.endswith(" and 2 more")
    assert missing_sockets([listener], [replace(listener, state="CLOSE")]) == (listener,)


def test_equal_sockets_are_counted() -> None:
    assert missing_sockets([tcp(), tcp()], [tcp()]) == (tcp(),)
    waiting = replace(tcp(remote="192.0.2.9", remote_port=1), state="TIME_WAIT")
    assert missing_sockets([waiting], []) == ()


def test_udp_sockets_are_no_connections() -> None:
    udp: tuple[SocketFacts, ...] = (replace(SOCKETS[1], protocol="udp"),)
    result = ended(replace(SOURCE, sockets=udp), replace(DESTINATION, sockets=udp))
    assert (result.established, result.restored) == (0, 0)


def test_a_refusal_has_the_code_of_its_first_finding_and_the_messages_of_all() -> None:
    errors = [finding("CRIU_MISSING", "beta", "no criu"), finding("NOT_ROOT", "beta", "uid 7")]
    one = refused_result(**NAMES, source="alpha", destination="beta", findings=[errors[0], WARNING])
    assert one.error == {"code": "CRIU_MISSING", "message": "beta: no criu", "hint": errors[0].hint}
    assert one.warnings == ("beta: eth0 has 9000, alpha's eth0 1500",)
    assert one.exit_code is ExitCode.REFUSED
    two = refused_result(**NAMES, source="alpha", destination="beta", findings=errors)
    assert two.error is not None
    assert two.error["message"] == "beta: no criu; beta: uid 7"
    assert two.error["hint"] == errors[0].hint


def test_a_finding_names_its_host_once() -> None:
    assert finding("NOT_ROOT", "beta", "uid 7").sentence == "beta: uid 7"
    for message in ("beta: no route", "beta does not have 192.0.2.200"):
        assert finding("NOT_ROOT", "beta", message).sentence == message
    assert finding("NOT_ROOT", "beta", "betamax").sentence == "beta: betamax"


def test_doctor_json() -> None:
    bad = finding("NOT_ROOT", "beta", "uid 7")
    good = HostReport(name="alpha", findings=(), facts=healthy_facts(11), self_test=SelfTestResult(ok=True))
    told = DoctorReport(hosts=(good, HostReport(name="beta", findings=(bad,)))).to_json()
    assert set(told) == {"exit_code", "hosts"}
    assert told["exit_code"] == 3
    assert [host["ok"] for host in told["hosts"]] == [True, False]
    assert set(told["hosts"][0]) == {"name", "ok", "findings", "facts", "self_test"}
    assert told["hosts"][1]["findings"] == [
        {"code": "NOT_ROOT", "severity": "error", "where": "beta", "message": "uid 7", "hint": bad.hint}
    ]
    json.dumps(told)


def test_check_json() -> None:
    told = CheckReport(workload="counter", source=None, destination="beta", findings=(WARNING,)).to_json()
    assert set(told) == {"workload", "source", "destination", "ok", "exit_code", "findings"}
    assert (told["ok"], told["exit_code"]) == (True, 0)


def test_status_json() -> None:
    record = MigrationRecord(
        id="i",
        role="source",
        workload="counter",
        source="alpha",
        destination="beta",
        phase=Phase.STAGED,
        live=False,
        opened_at=1.0,
    )
    report = StatusReport(
        workloads=(WorkloadStatus(name="counter", running_on=("alpha",)),),
        unfinished=(HostMigration(host="alpha", record=record),),
        unreachable={"gamma": HostUnreachable("no route").to_wire()},
    )
    told = report.to_json()
    assert told["workloads"] == [{"name": "counter", "running_on": ["alpha"], "stopped_on": []}]
    assert told["unfinished"][0]["host"] == "alpha"
    assert told["unfinished"][0]["phase"] == "STAGED"
    assert told["unreachable"]["gamma"]["code"] == "HOST_UNREACHABLE"
    assert told["exit_code"] == 3
    assert replace(report, unreachable={}).exit_code is ExitCode.MOVED


def test_recovery_json() -> None:
    told = RecoveryResult(
        id="i",
        workload="counter",
        source="alpha",
        destination="beta",
        outcome="moved",
        exit_code=ExitCode.MOVED,
        phases={"alpha": Phase.RELEASED},
    ).to_json()
    assert told["phases"] == {"alpha": "RELEASED"}
    assert json.loads(json.dumps(told)) == told


def test_an_error_in_place_of_a_result() -> None:
    told = error_json(HostUnreachable("beta: no route"))
    assert (told["outcome"], told["exit_code"], told["error"]["code"]) == ("refused", 3, "HOST_UNREACHABLE")
