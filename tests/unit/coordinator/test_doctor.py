"""Doctor and check over hosts in memory: what is asked, and that a host that fails is a finding."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.config import Configuration
from coordinator.doctor import check, doctor
from coordinator.errors import (
    CommandFailed,
    DeadlineExceeded,
    ExitCode,
    HostUnreachable,
    SessionLost,
    UnknownHost,
    UnknownWorkload,
)
from coordinator.events import Event
from coordinator.facts import FirewallDrop, MoverFacts, MoverSpec, RouterSpec, ServicePort
from coordinator.fakes import FakeHost, FakeHosts
from coordinator.protocol import (
    Answers,
    AskFirewall,
    DescribeHost,
    DescribeMover,
    DescribeWorkload,
    Request,
    RunSelfTest,
    SelfTestResult,
    WhoAnswers,
)
from coordinator.report.checks import CheckReport, DoctorReport
from coordinator.sessions import open_sessions
from tests.unit.coordinator.samples import ABSENT, ADDRESS, BETA_MAC, RUNNING, configuration, hosts


@pytest.fixture
def config(tmp_path: Path) -> Configuration:
    return configuration(tmp_path)


def ignore(event: Event) -> None:
    pass


def probe(address: str, mac: str) -> tuple[bytes, ...]:
    return (f"{mac} asks for {address}".encode(),)


async def examine(config: Configuration, fakes: FakeHosts, *names: str) -> DoctorReport:
    return await doctor(config, names, connect=fakes.connect, sink=ignore)


async def ask(config: Configuration, fakes: FakeHosts, to: str = "beta", workload: str = "counter") -> CheckReport:
    report = await check(config, workload, to, connect=fakes.connect, probe_frames=probe, sink=ignore)
    assert fakes.open == 0
    return report


def codes(report: CheckReport) -> list[str]:
    return [each.code for each in report.findings]


async def test_doctor_examines_all_hosts(config: Configuration) -> None:
    fakes = hosts()
    report = await examine(config, fakes)
    assert [host.name for host in report.hosts] == ["alpha", "beta", "gamma"]
    assert report.exit_code == ExitCode.MOVED
    assert all(host.facts and host.self_test and host.self_test.ok for host in report.hosts)
    assert {type(request) for _, request in fakes.calls} == {DescribeHost, RunSelfTest}
    assert fakes.open == 0


async def test_doctor_examines_the_named_hosts_once(config: Configuration) -> None:
    report = await examine(config, hosts(), "gamma", "alpha", "gamma")
    assert [host.name for host in report.hosts] == ["gamma", "alpha"]


async def test_doctor_refuses_an_unknown_host_before_it_contacts_any(config: Configuration) -> None:
    fakes = hosts()
    with pytest.raises(UnknownHost):
        await examine(config, fakes, "alpha", "delta")
    assert fakes.calls == []


async def test_an_unreachable_host_is_a_finding_of_that_host(config: Configuration) -> None:
    fakes = hosts()
    fakes.hosts["beta"].unreachable = HostUnreachable("beta: no route to host")
    report = await examine(config, fakes)
    assert [[each.code for each in host.findings] for host in report.hosts] == [[], ["HOST_UNREACHABLE"], []]
    assert report.exit_code == ExitCode.REFUSED


async def test_a_host_that_is_lost_while_it_is_asked_is_a_finding(config: Configuration) -> None:
    fakes = hosts()
    fakes.hosts["beta"].failing[DescribeHost] = SessionLost("beta: connection reset")
    report = await examine(config, fakes, "beta")
    assert [each.code for each in report.hosts[0].findings] == ["SESSION_LOST"]


async def test_a_self_test_that_ends_in_an_error_has_failed(config: Configuration) -> None:
    fakes = hosts()
    fakes.hosts["beta"].failing[RunSelfTest] = CommandFailed("criu dump: exit status 1: Error (criu/x.c:1): no")
    report = await examine(config, fakes, "beta")
    assert [each.code for each in report.hosts[0].findings] == ["SELF_TEST_FAILED"]
    assert "criu/x.c:1" in report.hosts[0].findings[0].message


async def test_check_finds_where_the_workload_runs_and_nothing_wrong(config: Configuration) -> None:
    fakes = hosts()
    report = await ask(config, fakes)
    assert (report.source, report.destination, report.findings) == ("alpha", "beta", ())
    assert report.exit_code == ExitCode.MOVED
    asked = {(host, type(request)) for host, request in fakes.calls}
    assert asked == {
        *((host, DescribeWorkload) for host in ("alpha", "beta", "gamma")),
        *((host, DescribeHost) for host in ("alpha", "beta")),
        *((host, RunSelfTest) for host in ("alpha", "beta")),
        ("beta", WhoAnswers),
        ("beta", AskFirewall),
    }
    (question,) = [request for _, request in fakes.calls if isinstance(request, WhoAnswers)]
    assert (question.address, question.interface) == (ADDRESS, "eth0")
    assert question.frames == probe(ADDRESS, BETA_MAC)


@pytest.mark.parametrize(("workload", "to", "error"), [("x", "beta", UnknownWorkload), ("counter", "x", UnknownHost)])
async def test_check_refuses_unknown_names(config: Configuration, workload: str, to: str, error: type) -> None:
    fakes = hosts()
    with pytest.raises(error):
        await ask(config, fakes, to, workload)
    assert fakes.calls == []


async def test_check_of_a_workload_that_runs_nowhere(config: Configuration) -> None:
    fakes = hosts()
    fakes.hosts["alpha"].workloads["counter"] = ABSENT
    report = await ask(config, fakes)
    assert (report.source, codes(report)) == (None, ["WORKLOAD_NOT_RUNNING"])
    assert report.exit_code == ExitCode.REFUSED


async def test_check_where_the_workload_is_already(config: Configuration) -> None:
    fakes = hosts()
    report = await ask(config, fakes, "alpha")
    assert codes(report) == ["SAME_HOST"]
    assert not any(isinstance(request, WhoAnswers) for _, request in fakes.calls)


async def test_check_with_an_unreachable_third_host_is_a_warning(config: Configuration) -> None:
    fakes = hosts()
    fakes.hosts["gamma"].unreachable = HostUnreachable("gamma: no route to host")
    report = await ask(config, fakes)
    assert codes(report) == ["HOST_NOT_ASKED"]
    assert report.exit_code == ExitCode.MOVED


async def test_check_with_an_unreachable_destination(config: Configuration) -> None:
    fakes = hosts()
    fakes.hosts["beta"].unreachable = HostUnreachable("beta: no route to host")
    assert codes(await ask(config, fakes)) == ["HOST_UNREACHABLE"]


@pytest.mark.parametrize("request_type", [DescribeWorkload, DescribeHost, WhoAnswers])
async def test_check_with_a_destination_that_does_not_answer(
    config: Configuration, request_type: type[Request[object]]
) -> None:
    fakes = hosts()
    fakes.hosts["beta"].failing[request_type] = DeadlineExceeded("beta: no answer within 20 s")
    report = await ask(config, fakes)
    assert codes(report) == ["DEADLINE"]
    assert report.source == "alpha"


async def test_check_with_a_self_test_that_fails(config: Configuration) -> None:
    fakes = hosts()
    fakes.hosts["beta"].self_test = SelfTestResult(ok=False, problem="Can't get 1:16 opt")
    assert codes(await ask(config, fakes)) == ["SELF_TEST_FAILED"]


async def test_check_with_the_workload_on_two_hosts(config: Configuration) -> None:
    fakes = hosts()
    fakes.hosts["gamma"].workloads["counter"] = replace(RUNNING, root_pid=7)
    report = await ask(config, fakes)
    assert (report.source, codes(report)) == (None, ["RUNS_ON_SEVERAL"])


async def test_sessions_tell_who_failed_and_why(config: Configuration) -> None:
    fakes = hosts()
    fakes.hosts["beta"].unreachable = HostUnreachable("no")
    events: list[Event] = []
    async with open_sessions(config.hosts.values(), fakes.connect, events.append) as sessions:
        assert list(sessions.open) == ["alpha", "gamma"]
        assert list(sessions.failed) == ["beta"]
        assert fakes.open == 2
    assert fakes.open == 0
    assert {(event.host, event.state) for event in events} >= {("beta", "failed"), ("alpha", "completed")}


async def test_sessions_are_closed_when_the_work_fails_or_is_cancelled(config: Configuration) -> None:
    fakes = hosts()
    reached = asyncio.Event()

    async def work(error: Exception | None) -> None:
        async with open_sessions(config.hosts.values(), fakes.connect, ignore):
            reached.set()
            if error is not None:
                raise error
            await asyncio.Event().wait()

    with pytest.raises(SessionLost):
        await work(SessionLost("x"))
    assert fakes.open == 0
    task = asyncio.create_task(work(None))
    reached.clear()
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert fakes.open == 0


async def test_a_defect_while_connecting_is_not_hidden(config: Configuration) -> None:
    fakes = hosts()
    fakes.hosts["beta"].unreachable = ZeroDivisionError()  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError):
        async with open_sessions([config.host("beta")], fakes.connect, ignore):
            pass


def with_hook(config: Configuration) -> Configuration:
    counter = replace(config.workload("counter"), mover=MoverSpec(kind="hook", hook="/usr/local/sbin/move-address"))
    return replace(config, workloads={**config.workloads, "counter": counter})


async def test_a_hook_that_cannot_be_used_is_found_by_doctor_and_check(config: Configuration) -> None:
    fakes = hosts()
    fakes.hosts["beta"].mover = MoverFacts(problem="/usr/local/sbin/move-address is missing")
    report = await examine(with_hook(config), fakes)
    assert [[each.code for each in host.findings] for host in report.hosts] == [[], ["HOOK_UNUSABLE"], []]
    assert codes(await ask(with_hook(config), fakes)) == ["HOOK_UNUSABLE"]
    asked = {(host, request.addresses) for host, request in fakes.calls if isinstance(request, DescribeMover)}
    assert asked == {(name, (ADDRESS,)) for name in ("alpha", "beta", "gamma")}


async def test_only_the_source_is_asked_whether_it_reaches_the_router(config: Configuration) -> None:
    fakes = hosts()
    counter = replace(config.workload("counter"), mover=MoverSpec(kind="route", router=RouterSpec(address="192.0.2.1")))
    fakes.hosts["alpha"].mover = MoverFacts(routes={ADDRESS: "192.0.2.12"})
    report = await ask(replace(config, workloads={"counter": counter}), fakes)
    assert codes(report) == ["ROUTE_NOT_TO_SOURCE"]
    assert "the router 192.0.2.1 has 192.0.2.12 for 192.0.2.200, not alpha's 192.0.2.11" in report.findings[0].message
    assert [host for host, request in fakes.calls if isinstance(request, DescribeMover)] == ["alpha"]


class BeginsToMove(FakeHost):
    """Another move of the workload has come to another host by the time this one asks the segment."""

    def reply_to(self, request: Request[Any]) -> object:
        if isinstance(request, WhoAnswers):
            self.workloads["counter"] = replace(ABSENT, moving="0123")
            return Answers(macs=("02:00:5e:00:53:0d",))
        return super().reply_to(request)


async def test_a_move_that_begins_while_the_hosts_are_asked_is_what_is_told(config: Configuration) -> None:
    fakes = hosts()
    other = fakes.hosts["beta"]
    fakes.hosts["beta"] = BeginsToMove(other.facts, other.workloads)
    report = await ask(config, fakes)
    assert codes(report) == ["WORKLOAD_BUSY", "ADDRESS_ANSWERED_BY_OTHER"]
    assert "counter is part of migration 0123" in report.findings[0].message


async def test_a_firewall_that_drops_the_port_is_found(config: Configuration) -> None:
    fakes = hosts()
    ports = (ServicePort(protocol="tcp", address=ADDRESS, port=port) for port in (22, 7000))
    fakes.hosts["beta"].firewall = tuple(FirewallDrop(service=port, chain="inet filter input") for port in ports)
    report = await ask(config, fakes)
    assert codes(report) == ["FIREWALL_DROPS"]
    assert report.findings[0].message == "inet filter input drops what comes to tcp 192.0.2.200 port 7000"


async def test_a_firewall_that_cannot_be_asked_forbids_the_move(config: Configuration) -> None:
    fakes = hosts()
    fakes.hosts["beta"].failing[AskFirewall] = SessionLost("the session was lost")
    assert codes(await ask(config, fakes)) == ["SESSION_LOST"]
