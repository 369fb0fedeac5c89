"""Result objects of ``doctor`` and ``check``: plain frozen data with ``to_json`` and an ``exit_code``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coordinator.errors import ExitCode
from coordinator.facts import HostFacts
from coordinator.findings import Finding, errors_of
from coordinator.protocol import SelfTestResult
from coordinator.wire import encode


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReport:
    """One host as ``doctor`` found it; without ``facts`` it could not be asked."""

    name: str
    findings: tuple[Finding, ...]
    facts: HostFacts | None = None
    self_test: SelfTestResult | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """All hosts that were examined."""

    hosts: tuple[HostReport, ...]

    @property
    def exit_code(self) -> ExitCode:
        """``REFUSED`` if any host cannot take part."""
        return ExitCode.REFUSED if any(errors_of(host.findings) for host in self.hosts) else ExitCode.MOVED

    def to_json(self) -> dict[str, Any]:
        """The object of ``livemove doctor --json``."""
        return {
            "exit_code": int(self.exit_code),
            "hosts": [
                {
                    "name": host.name,
                    "ok": not errors_of(host.findings),
                    "findings": [each.to_json() for each in host.findings],
                    "facts": encode(host.facts),
                    "self_test": encode(host.self_test),
                }
                for host in self.hosts
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What speaks against a move; ``source`` is the host that runs the workload, if one was found."""

    workload: str
    source: str | None
    destination: str
    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> ExitCode:
        """``REFUSED`` if anything forbids the move."""
        return ExitCode.REFUSED if errors_of(self.findings) else ExitCode.MOVED

    def to_json(self) -> dict[str, Any]:
        """The object of ``livemove check --json``."""
        return {
            "workload": self.workload,
            "source": self.source,
            "destination": self.destination,
            "ok": not errors_of(self.findings),
            "exit_code": int(self.exit_code),
            "findings": [each.to_json() for each in self.findings],
        }
