"""The command line: exit statuses, one JSON object on standard output, everything else on standard error."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import coordinator.cli
from coordinator.cli import interruptible, main
from coordinator.errors import ExitCode, HostUnreachable, InDoubt, Interrupted, LivemoveError, UnknownMigration
from coordinator.fakes import FakeHosts
from coordinator.journal import Phase
from coordinator.report.result import MigrationResult, RecoveryResult, StatusReport, WorkloadStatus
from tests.unit.coordinator.samples import hosts, write_configuration

Run = Callable[..., Result]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> FakeHosts:
    made = hosts()
    monkeypatch.setattr(coordinator.cli, "connect", made.connect)
    return made


@pytest.fixture
def run(tmp_path: Path, fakes: FakeHosts) -> Run:
    path = write_configuration(tmp_path)

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["--config", str(path), *arguments])

    return invoke


def result(exit_code: ExitCode = ExitCode.MOVED, **changes: Any) -> MigrationResult:
    whole: dict[str, Any] = {
        "id": "i",
        "workload": "counter",
        "source": "alpha",
        "destination": "beta",
        "outcome": "moved",
        "exit_code": exit_code,
    }
    return MigrationResult(**{**whole, **changes})


def answer(monkeypatch: pytest.MonkeyPatch, name: str, reply: object) -> list[tuple[Any, ...]]:
    """Replace an entry point by one that answers, or raises, `reply`; returns what it was called with."""
    calls: list[tuple[Any, ...]] = []

    async def entry(config: object, *arguments: Any, **options: Any) -> object:
        calls.append((*arguments, {key: value for key, value in options.items() if key != "sink"}))
        if isinstance(reply, BaseException):
            raise reply
        return reply

    monkeypatch.setattr(coordinator.cli, name, entry)
    return calls


def only_object(done: Result) -> dict[str, Any]:
    told = json.loads(done.stdout)
    assert isinstance(told, dict)
    assert done.stdout.count("\n") == 1
    assert done.exit_code == told["exit_code"]
    return told


def test_help_has_examples_and_all_exit_statuses(run: Run) -> None:
    done = CliRunner().invoke(main, ["--help"])
    assert done.exit_code == 0
    assert "livemove migrate counter --to beta" in done.output
    assert all(f"{code.value:>5}  " in done.output for code in ExitCode)
    for command in ("doctor", "check", "migrate", "status", "recover"):
        assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0


def test_version() -> None:
    assert CliRunner().invoke(main, ["--version"]).output.startswith("livemove, version ")


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["migrate", "counter"], ["migrate", "--to", "beta"], ["doctor", "--speed"], ["--config"]]
)
def test_usage_errors(arguments: list[str]) -> None:
    done = CliRunner().invoke(main, arguments)
    assert (done.exit_code, done.stdout) == (ExitCode.USAGE, "")
    assert "Error: " in done.stderr or "Usage: " in done.stderr


def test_a_usage_error_with_json_is_an_object() -> None:
    told = only_object(CliRunner().invoke(main, ["migrate", "counter", "--json"]))
    assert (told["outcome"], told["exit_code"], told["error"]["code"]) == ("usage", 2, "USAGE")


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_a_bad_configuration(option: list[str], tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("hots = 1\n")
    done = CliRunner().invoke(main, ["--config", str(tmp_path / "x.toml"), "doctor", *option])
    assert done.exit_code == ExitCode.USAGE
    assert "did you mean 'hosts'?" in done.stderr
    assert "docs/" in done.stderr
    if option:
        assert only_object(done)["error"]["code"] == "CONFIG"
    else:
        assert done.stdout == ""


def test_doctor(run: Run, fakes: FakeHosts) -> None:
    done = run("doctor")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "alpha" in done.stdout
    fakes.hosts["beta"].unreachable = HostUnreachable("beta: no route to host")
    told = only_object(run("doctor", "beta", "--json"))
    assert [host["name"] for host in told["hosts"]] == ["beta"]
    assert told["exit_code"] == ExitCode.REFUSED


def test_check(run: Run, fakes: FakeHosts) -> None:
    assert only_object(run("check", "counter", "--to", "beta", "--json"))["source"] == "alpha"
    assert run("check", "counter", "--to", "alpha").exit_code == ExitCode.REFUSED
    fakes.hosts.clear()
    told = only_object(run("check", "counter", "--to", "beta", "--json"))
    assert told["findings"][0]["code"] == "HOST_UNREACHABLE"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["check", "conter", "--to", "beta"], "UNKNOWN_WORKLOAD"),
        (["check", "counter", "--to", "betta"], "UNKNOWN_HOST"),
        (["doctor", "betta"], "UNKNOWN_HOST"),
    ],
)
def test_unknown_names(run: Run, fakes: FakeHosts, arguments: list[str], code: str) -> None:
    done = run(*arguments, "--json")
    told = only_object(done)
    assert (told["exit_code"], told["error"]["code"]) == (ExitCode.USAGE, code)
    assert "did you mean" in done.stderr
    assert fakes.calls == []


@pytest.mark.parametrize("exit_code", list(ExitCode))
def test_migrate_exits_as_its_result_says(run: Run, monkeypatch: pytest.MonkeyPatch, exit_code: ExitCode) -> None:
    calls = answer(monkeypatch, "migrate", result(exit_code))
    assert run("migrate", "counter", "--to", "beta", "--quiet").exit_code == exit_code
    assert only_object(run("migrate", "counter", "--to", "beta", "--dry-run", "--json"))["id"] == "i"
    assert calls == [("counter", "beta", {"dry_run": False}), ("counter", "beta", {"dry_run": True})]


@pytest.mark.parametrize(
    ("error", "outcome", "exit_code"),
    [
        (Interrupted("interrupted"), "interrupted", ExitCode.INTERRUPTED),
        (InDoubt("who knows"), "in_doubt", ExitCode.IN_DOUBT),
        (HostUnreachable("beta: no route"), "refused", ExitCode.REFUSED),
    ],
)
def test_migrate_that_ends_in_an_error(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: LivemoveError, outcome: str, exit_code: ExitCode
) -> None:
    answer(monkeypatch, "migrate", error)
    done = run("migrate", "counter", "--to", "beta", "--json")
    told = only_object(done)
    assert (told["outcome"], told["exit_code"]) == (outcome, exit_code)
    assert told["error"] == error.to_wire()
    assert error.message in done.stderr
    assert error.hint.split()[0] in done.stderr


def test_a_defect_in_a_move_leaves_in_doubt_where_the_service_is(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "migrate", ZeroDivisionError("oops"))
    done = run("migrate", "counter", "--to", "beta", "--json")
    assert only_object(done)["exit_code"] == ExitCode.IN_DOUBT
    assert "Traceback" in done.stderr
    answer(monkeypatch, "status", ZeroDivisionError("oops"))
    assert run("status").exit_code == ExitCode.REFUSED


def test_status_and_recover(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    report = StatusReport(workloads=(WorkloadStatus(name="counter", running_on=("alpha",)),), unreachable={})
    answer(monkeypatch, "status", report)
    assert only_object(run("status", "--json"))["workloads"][0]["running_on"] == ["alpha"]
    assert "alpha" in run("status").stdout
    recovered = RecoveryResult(
        id="i",
        workload="counter",
        source="alpha",
        destination="beta",
        outcome="rolled_back",
        exit_code=ExitCode.MOVED,
        phases={"alpha": Phase.ROLLED_BACK},
    )
    calls = answer(monkeypatch, "recover", recovered)
    assert only_object(run("recover", "i", "--json"))["outcome"] == "rolled_back"
    assert calls[0][0] == "i"
    answer(monkeypatch, "recover", UnknownMigration("no host knows x"))
    assert run("recover", "x").exit_code == ExitCode.USAGE


async def test_the_first_signal_cancels_once_and_the_second_only_says_so() -> None:
    said: list[str] = []
    second = asyncio.Event()
    cancellations = 0

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            second.set()

    async def move() -> str:
        nonlocal cancellations
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancellations += 1
            os.kill(os.getpid(), signal.SIGTERM)
            await second.wait()
        return "rolled back"

    assert await interruptible(move(), say) == "rolled back"
    assert cancellations == 1
    assert said == ["interrupted: going back", "the roll-back is under way"]


async def test_work_that_a_signal_ends_is_interrupted() -> None:
    async def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    with pytest.raises(Interrupted):
        await interruptible(work(), lambda _: None)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
