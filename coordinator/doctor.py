"""Gather facts from the hosts, and have ``preflight`` judge them: ``livemove doctor`` and ``livemove check``.

Everything here only reads, but for the self-test, which dumps and restores a small process of its own. ``survey`` is
what ``check`` and ``migrate`` share.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_interface
from typing import TypeVar

from coordinator.compare_files import compare_files
from coordinator.config import Configuration, Host
from coordinator.errors import LivemoveError
from coordinator.events import EventSink
from coordinator.facts import FilesFacts, FirewallDrop, HostFacts, MoverFacts, MoverSpec, WorkloadFacts, WorkloadSpec
from coordinator.findings import Finding, errors_of, from_error, in_order
from coordinator.move_facts import MoveFacts, running_on, service_ports
from coordinator.plan import FrameBuilder
from coordinator.preflight import host_findings, is_unicast_mac, move_findings
from coordinator.preflight_addresses import mover_problem
from coordinator.protocol import (
    AskFirewall,
    DescribeHost,
    DescribeMover,
    DescribeWorkload,
    Request,
    RunSelfTest,
    SelfTestResult,
    WhoAnswers,
)
from coordinator.report.checks import CheckReport, DoctorReport, HostReport
from coordinator.sessions import Session, SessionFactory, Sessions, open_sessions

R = TypeVar("R")

DESCRIBE_S = 20.0
SELF_TEST_S = 30.0
#: So old may the success of a self-test be that a move relies on; ``doctor`` makes a new one.
SELF_TEST_AGE_S = 3600.0
#: A second is what duplicate address detection waits. But machines on the segment answer within milliseconds: once the
#: one that runs the service has, another is not waited for that long.
ANSWER_WAIT_S, ANSWER_SETTLE_S = 1.0, 0.2


@dataclass(frozen=True)
class Survey:
    """What was found out before a move, and what it means."""

    facts: MoveFacts
    findings: tuple[Finding, ...]

    @property
    def source(self) -> str | None:
        """The one host that runs the workload, if there is one."""
        return self.facts.source

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that forbid the move."""
        return errors_of(self.findings)


async def doctor(
    config: Configuration, names: Sequence[str], *, connect: SessionFactory, sink: EventSink
) -> DoctorReport:
    """Examine the named hosts, or all, at the same time. A host that cannot be reached is a finding of that host.

    Raises ``UnknownHost`` before anything is contacted.
    """
    hosts = [config.host(name) for name in dict.fromkeys(names)] or list(config.hosts.values())
    workloads = tuple(config.workloads.values())
    async with open_sessions(hosts, connect, sink) as sessions:
        return DoctorReport(hosts=tuple(await asyncio.gather(*(_examine(host, sessions, workloads) for host in hosts))))


async def _examine(host: Host, sessions: Sessions, workloads: Sequence[WorkloadSpec]) -> HostReport:
    if host.name in sessions.failed:
        return HostReport(name=host.name, findings=(from_error(host.name, sessions.failed[host.name]),))
    session = sessions.open[host.name]
    facts, self_test = await asyncio.gather(_describe_host(session), _self_test(session))
    if isinstance(facts, LivemoveError):
        return HostReport(name=host.name, findings=(from_error(host.name, facts),), self_test=self_test)
    findings = list(host_findings(host.name, host.interface, facts, self_test, {each.runtime for each in workloads}))
    for mover, addresses in _movers(workloads).items():
        described, lost = await _ask({host.name: session}, _describe_mover(mover, addresses), DESCRIBE_S)
        findings += [each for found in described.values() for each in mover_problem(host.name, mover, found)]
        findings += [from_error(host.name, error) for error in lost.values()]
    return HostReport(name=host.name, findings=in_order(findings), facts=facts, self_test=self_test)


def _movers(workloads: Iterable[WorkloadSpec]) -> dict[MoverSpec, tuple[str, ...]]:
    """The movers that can be missing on a host, each with the addresses it moves."""
    found: dict[MoverSpec, tuple[str, ...]] = {}
    for workload in workloads:
        if workload.mover.kind != "l2":
            found[workload.mover] = found.get(workload.mover, ()) + _bare(workload)
    return found


def _bare(workload: WorkloadSpec) -> tuple[str, ...]:
    """The service addresses without prefix lengths."""
    return tuple(str(ip_interface(text).ip) for text in workload.addresses)


def _describe_mover(mover: MoverSpec, addresses: tuple[str, ...]) -> Callable[[Host], DescribeMover]:
    return lambda host: DescribeMover(mover=mover, addresses=addresses, interface=host.interface)


async def check(
    config: Configuration,
    workload: str,
    to: str,
    *,
    connect: SessionFactory,
    probe_frames: FrameBuilder,
    sink: EventSink,
) -> CheckReport:
    """Every reason why moving the workload to that host would fail or lose something; changes nothing.

    Raises ``UnknownWorkload`` and ``UnknownHost`` before anything is contacted.
    """
    spec, destination = config.workload(workload), config.host(to)
    async with open_sessions(config.hosts.values(), connect, sink) as sessions:
        found = await survey(config, spec, destination, sessions, probe_frames)
    return CheckReport(workload=workload, source=found.source, destination=to, findings=found.findings)


async def survey(
    config: Configuration, workload: WorkloadSpec, destination: Host, sessions: Sessions, probe_frames: FrameBuilder
) -> Survey:
    """Ask all hosts where the workload runs, and source and destination for everything else; then judge it.

    ``sessions`` are with all configured hosts (``open_sessions``) and stay open. A host that fails to answer is told in
    the findings; nothing is raised for it. ``probe_frames`` is ``netfix.announce.probe_frames``.
    """
    workloads, failed = await _ask(sessions.open, lambda _: DescribeWorkload(workload=workload), DESCRIBE_S)
    running = running_on(workloads)
    ends = {name: sessions.open[name] for name in (*running[:1], destination.name) if name in workloads}
    (hosts, lost), self_tests = await asyncio.gather(
        _ask(ends, lambda host: DescribeHost(interface=host.interface), DESCRIBE_S), _self_tests(ends)
    )
    movers: dict[str, MoverFacts] = {}
    for mover, addresses in _movers([workload]).items():
        # A route is changed by the source alone; to a network of its own the destination has to pass packets on.
        alone = mover.kind == "route" and all(workloads[name].namespace is None for name in running[:1])
        taking_part = running[:1] if alone else tuple(ends)
        asked_for = {name: session for name, session in ends.items() if name in taking_part}
        movers, unknown = await _ask(asked_for, _describe_mover(mover, addresses), DESCRIBE_S)
        lost |= unknown
    answers: dict[str, tuple[str, ...]] = {}
    firewall: tuple[FirewallDrop, ...] = ()
    files: dict[str, FilesFacts] = {}
    differing: dict[str, str] = {}
    if destination.name in hosts and running and running[0] != destination.name:
        try:
            session = sessions.open[destination.name]
            answers = await _who_answers(session, workload, hosts[destination.name], probe_frames)
            services = service_ports(workload, workloads[running[0]])
            asked = AskFirewall(interface=destination.interface, services=services)
            firewall = (await session.call(asked, DESCRIBE_S)).drops
            ends = {name: sessions.open[name] for name in (running[0], destination.name)}
            files, differing = await compare_files(ends, workload.name, workloads[running[0]].trees)
        except LivemoveError as error:
            lost[destination.name] = error  # not knowing who has the address, what is dropped, or what files are there
    facts = MoveFacts(
        workload=workload,
        destination=destination.name,
        interfaces={name: host.interface for name, host in config.hosts.items()},
        hosts=hosts,
        workloads=workloads,
        unreachable={**sessions.failed, **failed, **lost},
        self_tests=self_tests,
        answers=answers,
        movers=movers,
        firewall=firewall,
        files=files,
        differing=differing,
    )
    findings = move_findings(facts)
    if any(each.code == "ADDRESS_ANSWERED_BY_OTHER" for each in findings):
        facts = replace(facts, workloads=await _moving_meanwhile(sessions, workloads, workload))
        findings = move_findings(facts)
    return Survey(facts, findings)


async def _moving_meanwhile(
    sessions: Sessions, workloads: Mapping[str, WorkloadFacts], workload: WorkloadSpec
) -> dict[str, WorkloadFacts]:
    """The workload's facts, with a move that has begun since they were asked for: then it is the destination of that
    move which answers, and nobody's fault."""
    now, _ = await _ask(sessions.open, lambda _: DescribeWorkload(workload=workload), DESCRIBE_S)
    return {name: replace(each, moving=now.get(name, each).moving) for name, each in workloads.items()}


async def _ask(
    sessions: Mapping[str, Session], request: Callable[[Host], Request[R]], deadline_s: float
) -> tuple[dict[str, R], dict[str, LivemoveError]]:
    """Ask several hosts at the same time: the replies, and the errors of those that gave none."""
    replies: dict[str, R] = {}
    errors: dict[str, LivemoveError] = {}

    async def one(name: str, session: Session) -> None:
        try:
            replies[name] = await session.call(request(session.host), deadline_s)
        except LivemoveError as error:
            errors[name] = error

    await asyncio.gather(*(one(name, session) for name, session in sessions.items()))
    in_order = [name for name in sessions if name in replies]
    return {name: replies[name] for name in in_order}, errors


async def _describe_host(session: Session) -> HostFacts | LivemoveError:
    try:
        return await session.call(DescribeHost(interface=session.host.interface), DESCRIBE_S)
    except LivemoveError as error:
        return error


async def _self_tests(sessions: Mapping[str, Session]) -> dict[str, SelfTestResult]:
    results = await asyncio.gather(*(_self_test(session, SELF_TEST_AGE_S) for session in sessions.values()))
    return dict(zip(sessions, results, strict=True))


async def _self_test(session: Session, max_age_s: float = 0.0) -> SelfTestResult:
    """Run the self-test; one that ended in an error of the agent has failed, and that is its problem."""
    try:
        return await session.call(RunSelfTest(max_age_s=max_age_s), SELF_TEST_S)
    except LivemoveError as error:
        return SelfTestResult(ok=False, problem=error.message)


async def _who_answers(
    session: Session, workload: WorkloadSpec, facts: HostFacts, probe_frames: FrameBuilder
) -> dict[str, tuple[str, ...]]:
    """Who answers the destination for each service address; nothing where its interface cannot ask."""
    interface = facts.interface
    if interface is None or not interface.up or not is_unicast_mac(interface.mac):
        return {}  # preflight says what is wrong with the interface
    found: dict[str, tuple[str, ...]] = {}

    async def one(address: str) -> None:
        frames = probe_frames(address, interface.mac)
        request = WhoAnswers(
            interface=interface.name,
            address=address,
            frames=frames,
            wait_s=ANSWER_WAIT_S,
            settle_s=ANSWER_SETTLE_S,
        )
        found[address] = (await session.call(request, ANSWER_WAIT_S + DESCRIBE_S)).macs

    await asyncio.gather(*(one(address) for address in _bare(workload)))
    return found
