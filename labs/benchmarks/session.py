"""The lab a benchmark runs in, a service and its clients, and a move by livemove; all of it goes away at the end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from labs import workloads
from labs.benchmarks.measure import Row
from labs.clients.control import ClientProcess
from labs.commands import LabError
from labs.lab import Lab, down
from labs.livemove import migrate
from labs.machines import Host
from labs.state import Paths
from labs.steps import Steps

SERVICE = "counter"
HOSTS = ("alpha", "beta")
PATIENCE_S = 45.0
"""A client's connection that is silent for so long is lost: well above the longest plain migration of 2 GB."""


@dataclass(frozen=True)
class Settings:
    """What all benchmarks are told: the lab's name, livemove's mode, and where to say how it goes."""

    lab: str
    mode: str
    steps: Steps


@contextmanager
def fresh_lab(settings: Settings) -> Iterator[Lab]:
    """A lab of the benchmark's own, with the mode in livemove's policy. Taken down at the end, however it comes."""
    _take_down(settings.lab)
    try:
        with settings.steps.step("Lab up"):
            lab = Lab.up(settings.lab, progress=settings.steps.note)
        with lab.config_path.open("a") as file:
            file.write(f'\n[policy]\nmode = "{settings.mode}"\n')
        yield lab
    finally:
        _take_down(settings.lab)


def _take_down(lab: str) -> None:
    # A second Ctrl-C would leave behind what the first one asked to have taken away. This takes a second.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        down(Paths(lab))
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(frozen=True)
class Service:
    """The pattern service in a lab."""

    lab: Lab
    workload: workloads.Workload

    @classmethod
    def started(
        cls, lab: Lab, *, memory_mb: int = 0, dirty_mb_s: float = 0.0, program: str = "pattern_server"
    ) -> Service:
        """A service that was just started on the first host."""
        plain = workloads.Workload.of_lab(lab, SERVICE, memory_mb=memory_mb, dirty_mb_s=dirty_mb_s)
        workload = replace(plain, program=program)
        workloads.stop(lab, workload)
        workloads.install(lab, workload)
        workloads.start(lab, workload, HOSTS[0])
        return cls(lab, workload)

    @property
    def address(self) -> str:
        return self.workload.listens_on[0]

    def where(self) -> Host:
        """The one host it runs on."""
        found = workloads.where(self.lab, self.workload)
        if len(found) != 1:
            raise LabError(f"the service listens on {' and '.join(found) or 'no host'}")
        return self.lab.host(found[0])

    def asker(self, *, connections: int = 1, connect_every_ms: float = 0, at_once: int = 1) -> Asker:
        return Asker(self, connections, connect_every_ms, at_once)

    def used_memory_mb(self) -> float:
        """What it holds in memory, its interpreter included."""
        host = self.where()
        pid = workloads.listening_pids(host, self.workload)[0]
        lines = host.read_file(f"/proc/{pid}/status").splitlines()
        return round(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024, 1)


class Asker(ClientProcess):
    """A running `labs/clients/asker.py`, which asks the service and keeps the times."""

    def __init__(self, service: Service, connections: int, connect_every_ms: float, at_once: int) -> None:
        options = {
            "address": service.address,
            "port": workloads.PORT,
            "connections": connections,
            "connect-every-ms": connect_every_ms,
            "at-once": at_once,
            "patience-s": PATIENCE_S,
        }
        argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        super().__init__(service.lab, "labs.clients.asker", argv, answer_timeout_s=3 * PATIENCE_S)

    def begin(self) -> None:
        """Keep times from now on."""
        self._ask("begin")

    def end(self) -> Row:
        """What was seen since `begin`: `labs.clients.asker.Seen` as a dictionary."""
        return self._ask("end")

    def round(self) -> Row:
        """Have every connection ask once: connections, answered, wrong_bytes, troubles."""
        return self._ask("round")


@dataclass(frozen=True)
class Meter:
    """CPU seconds and sent bytes of a host, since it went up.

    The CPU time is that of the host's group `init`: everything that a migration runs there (sshd, agent, runc, CRIU,
    tar), ended or not, and not the service, which has a group of its own. The bytes are those that left its interface.
    """

    cpu_s: float
    sent_bytes: int

    @classmethod
    def read(cls, host: Host) -> Meter:
        usage = dict(line.split() for line in (host.group / "cpu.stat").read_text().splitlines())
        sent = host.read_file(f"/sys/class/net/{host.interface}/statistics/tx_bytes")
        return cls(int(usage["usage_usec"]) / 1e6, int(sent))

    def __sub__(self, before: Meter) -> Meter:
        return Meter(round(self.cpu_s - before.cpu_s, 3), self.sent_bytes - before.sent_bytes)


def move(service: Service, destination: str) -> Row:
    """One `livemove migrate`; its result object. A move that did not take place is a LabError."""
    result = migrate(service.lab, service.workload.name, destination)
    if result.get("outcome") != "moved":
        raise LabError(f"livemove: {result.get('outcome')}: {result.get('error')}")
    return result


def other(host: Host) -> str:
    """The host to move to."""
    return HOSTS[1 - HOSTS.index(host.name)]


def settle(seconds: float) -> None:
    """Let clients go on for a while: what goes wrong late counts too, and their TCP forgets the last trouble."""
    time.sleep(seconds)


def load_average() -> float:
    return round(os.getloadavg()[0], 2)


def kernel() -> str:
    return Path("/proc/sys/kernel/osrelease").read_text().strip()
