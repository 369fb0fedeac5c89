"""Reports as text for people, for standard output. What is said here is free to change; scripts read ``--json``."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coordinator.errors import EXIT_MEANINGS, LivemoveError
from coordinator.findings import Finding
from coordinator.report.checks import CheckReport, DoctorReport
from coordinator.report.result import MigrationResult, RecoveryResult, StatusReport

_MARKS = {"error": "[red]error  [/]", "warning": "[yellow]warning[/]", "note": "note   "}
_MIB = 1024 * 1024


def show_doctor(report: DoctorReport, console: Console) -> None:
    """Every host with its findings."""
    for host in report.hosts:
        about = ""
        if host.facts is not None:
            criu = f", CRIU {host.facts.criu.version}" if host.facts.criu else ""
            about = f" ({host.facts.machine}, Linux {host.facts.kernel}{criu}, cgroup {host.facts.cgroup})"
        _line(console, f"[bold]{escape(host.name)}[/]{escape(about)}")
        if host.self_test is not None and host.self_test.ok:
            dump_ms, restore_ms = host.self_test.dump_ms, host.self_test.restore_ms
            _line(console, f"  self-test: dumped in {dump_ms:.0f} ms, restored in {restore_ms:.0f} ms")
        _show_findings(host.findings, console)
        if not host.findings:
            _line(console, "  [green]ok[/]")


def show_check(report: CheckReport, console: Console) -> None:
    """What speaks against the move, or that nothing does."""
    _line(console, f"[bold]{escape(report.workload)}[/]: {report.source or '?'} → {escape(report.destination)}")
    _show_findings(report.findings, console)
    if report.exit_code == 0:
        _line(console, "  [green]nothing forbids the move[/]")


def show_migration(result: MigrationResult, console: Console) -> None:
    """How the move ended, with its times."""
    way = f"{result.source or '?'} → {result.destination}"
    colour = "green" if result.exit_code == 0 else "red"
    outcome = result.outcome.replace("_", " ")
    _line(console, f"[bold]{escape(result.workload)}[/] {escape(way)}: [{colour}]{outcome}[/] ({escape(result.id)})")
    if result.phases:
        _line(console, f"  frozen {result.freeze_ms:.0f} ms of {result.total_ms:.0f} ms, mode {result.mode}")
        _line(console, f"  {result.frozen_bytes / _MIB:.1f} MiB sent while frozen")
    if result.outcome == "moved":
        _line(console, f"  {result.restored} of {result.established} connections restored")
    if result.findings:
        _show_findings(result.findings, console)
    shown = {each.sentence for each in result.findings}
    for warning in result.warnings:
        if warning not in shown:
            _line(console, f"  {_MARKS['warning']} {escape(warning)}")
    if result.error is not None and result.outcome != "refused":
        _show_error(result.error, console)
    _line(
        console,
        f"  {EXIT_MEANINGS[result.exit_code] if result.outcome != 'planned' else 'Dry run: nothing was changed.'}",
    )


def show_status(report: StatusReport, console: Console) -> None:
    """Where each workload runs, and what is unfinished."""
    table = Table("workload", "runs on", "stopped on", box=None, pad_edge=False)
    for each in report.workloads:
        table.add_row(escape(each.name), ", ".join(each.running_on) or "-", ", ".join(each.stopped_on) or "-")
    console.print(table)
    for one in report.unfinished:
        record = one.record
        state = "running now" if record.live else f"unfinished: livemove recover {record.id}"
        way = f"{record.source} → {record.destination}"
        _line(console, escape(f"{record.id} ({record.workload}, {way}) on {one.host}: {record.phase}, {state}"))
    for host, error in report.unreachable.items():
        _line(console, f"{escape(host)}: [red]{escape(error['message'])}[/]")


def show_recovery(result: RecoveryResult, console: Console) -> None:
    """Where the recovered migration ended."""
    outcome = result.outcome.replace("_", " ")
    _line(console, escape(f"{result.id} ({result.workload}, {result.source} → {result.destination}): {outcome}"))
    for host, phase in result.phases.items():
        _line(console, escape(f"  {host}: {phase}"))
    for warning in result.warnings:
        _line(console, f"  {_MARKS['warning']} {escape(warning)}")
    if result.error is not None:
        _show_error(result.error, console)


def show_error(error: LivemoveError, console: Console) -> None:
    """An error that ended a command, for standard error."""
    show_told_error(error.to_wire(), console)


def show_told_error(error: dict[str, str], console: Console) -> None:
    """The error of a result whose JSON went to standard output: people read it on standard error."""
    _show_error(error, console, indent="")


def _show_error(error: dict[str, str], console: Console, indent: str = "  ") -> None:
    _line(console, f"{indent}{_MARKS['error'].strip()} {escape(error['code'])}: {escape(error['message'])}")
    _line(console, f"{indent}  → {escape(error['hint'])}")


def _show_findings(findings: Iterable[Finding], console: Console) -> None:
    for each in findings:
        _line(console, f"  {_MARKS[each.severity]} {each.code} {escape(each.sentence)}")
        _line(console, f"          → {escape(each.hint)}")


def _line(console: Console, markup: str) -> None:
    """One line, however long: what is wrapped cannot be pasted or searched for."""
    console.print(markup, soft_wrap=True, highlight=False)
