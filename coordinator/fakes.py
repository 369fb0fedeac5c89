"""Hosts in memory, for tests: sessions that answer from given facts, or with given errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from coordinator.config import Host
from coordinator.errors import HostUnreachable, LivemoveError, ProtocolError
from coordinator.events import EventSink
from coordinator.facts import CriuFacts, FirewallDrop, HostFacts, InterfaceFacts, MoverFacts, WorkloadFacts
from coordinator.protocol import (
    Answers,
    AskFirewall,
    DescribeHost,
    DescribeMover,
    DescribeWorkload,
    FirewallDrops,
    ListMigrations,
    MigrationRecords,
    Request,
    RunSelfTest,
    SelfTestResult,
    WhoAnswers,
)

R = TypeVar("R")


def healthy_facts(number: int) -> HostFacts:
    """The facts of a host that lacks nothing; ``number`` tells one such host from another."""
    return HostFacts(
        hostname=f"host{number}",
        identity=f"boot/{number}",
        kernel="6.18.0",
        machine="x86_64",
        python="3.13.5",
        euid=0,
        missing_capabilities=(),
        criu=CriuFacts(path="/usr/sbin/criu", version="4.2.1"),
        runtimes={"runc": "1.3.6"},
        cgroup="v2",
        nf_tables=True,
        interface=InterfaceFacts(
            name="eth0", mac=f"02:00:5e:00:53:{number:02x}", up=True, mtu=1500, addresses=(f"192.0.2.{number}/24",)
        ),
        interfaces=("lo", "eth0"),
        memory_available_bytes=4 << 30,
        leftovers=(),
        unfinished=(),
        tracks_connections=True,
        agent_rss_bytes=30 << 20,
        tracker="write_protect",
    )


@dataclass
class FakeHost:
    """One host. ``unreachable`` is raised on connecting; ``failing`` when a request of that type is made; ``replies``
    answers requests that facts do not."""

    facts: HostFacts
    workloads: dict[str, WorkloadFacts] = field(default_factory=dict)
    self_test: SelfTestResult = field(default_factory=lambda: SelfTestResult(ok=True, dump_ms=20.0, restore_ms=30.0))
    answers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    mover: MoverFacts = field(default_factory=MoverFacts)
    firewall: tuple[FirewallDrop, ...] = ()
    unreachable: LivemoveError | None = None
    failing: dict[type[Request[Any]], LivemoveError] = field(default_factory=dict)
    replies: dict[type[Request[Any]], object] = field(default_factory=dict)

    def reply_to(self, request: Request[Any]) -> object:
        """What the host's agent answers."""
        if type(request) in self.failing:
            raise self.failing[type(request)]
        answers: dict[type[Request[Any]], object] = {
            DescribeHost: self.facts,
            RunSelfTest: self.self_test,
            DescribeMover: self.mover,
            ListMigrations: MigrationRecords(records=()),
            **self.replies,
        }
        match request:
            case _ if type(request) in answers:
                return answers[type(request)]
            case DescribeWorkload(workload=workload):
                return self.workloads.get(workload.name, WorkloadFacts(state="absent"))
            case WhoAnswers(address=address):
                return Answers(macs=self.answers.get(address, ()))
            case AskFirewall(services=services):
                return FirewallDrops(drops=tuple(each for each in self.firewall if each.service in services))
        raise ProtocolError(f"the fake host {self.facts.hostname} has no reply to {type(request).__name__}")


class FakeSession:
    """A ``Session`` with a ``FakeHost``; ``calls`` are the requests made."""

    def __init__(self, host: Host, fake: FakeHost, calls: list[tuple[str, Request[Any]]]) -> None:
        self._host = host
        self._fake = fake
        self._calls = calls

    @property
    def host(self) -> Host:
        """The host it is a session with."""
        return self._host

    async def call(self, request: Request[R], deadline_s: float) -> R:
        """Answer at once; ``deadline_s`` never passes."""
        self._calls.append((self._host.name, request))
        return cast(R, self._fake.reply_to(request))


@dataclass
class FakeHosts:
    """A ``SessionFactory`` (``connect``) for hosts in memory. ``open`` counts the sessions that are open now."""

    hosts: dict[str, FakeHost]
    calls: list[tuple[str, Request[Any]]] = field(default_factory=list)
    open: int = 0

    @asynccontextmanager
    async def connect(self, host: Host, sink: EventSink) -> AsyncIterator[FakeSession]:
        """Open a session, as ``ssh.connect`` does."""
        fake = self.hosts.get(host.name)
        if fake is None:
            raise HostUnreachable(f"{host.name}: no such host among the fakes")
        if fake.unreachable is not None:
            raise fake.unreachable
        self.open += 1
        try:
            yield FakeSession(host, fake, self.calls)
        finally:
            self.open -= 1
