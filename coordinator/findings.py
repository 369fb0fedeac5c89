"""Findings: the results of checks. What each code means is in ``checks.py``.

Two more families of codes occur in findings: the codes of ``errors.py`` where a host could not be asked
(``from_error``), and the codes of the obstacles that an agent found in the workload (``from_obstacle``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from coordinator.checks import CHECKS, Severity
from coordinator.errors import LivemoveError
from coordinator.facts import Obstacle

_ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of a check. ``where`` is the host, or the workload; ``error`` means that a move would fail."""

    code: str
    severity: Severity
    message: str
    hint: str
    where: str

    @property
    def sentence(self) -> str:
        """Where and what. Errors of a host begin with its name already."""
        named = self.message.partition(" ")[0].rstrip(":") == self.where
        return self.message if named else f"{self.where}: {self.message}"

    def to_json(self) -> dict[str, str]:
        """Plain data for ``--json``."""
        return asdict(self)


def finding(code: str, where: str, message: str, hint: str | None = None) -> Finding:
    """A finding of a registered code, with its severity, and its hint unless a better one is given."""
    check = CHECKS[code]
    return Finding(code, check.severity, message, hint or check.hint, where)


def from_error(where: str, error: LivemoveError) -> Finding:
    """A host could not be asked: the error as a finding, with the error's code."""
    return Finding(error.code, "error", error.message, error.hint, where)


def from_obstacle(where: str, obstacle: Obstacle) -> Finding:
    """Something in the workload that an agent knows cannot be dumped (error) or would be lost (warning)."""
    severity: Severity = "error" if obstacle.fatal else "warning"
    return Finding(obstacle.code, severity, obstacle.message, obstacle.hint, where)


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors first, then warnings, then notes; otherwise in the order they were found."""
    return tuple(sorted(findings, key=lambda each: _ORDER[each.severity]))


def errors_of(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Those findings that forbid the move."""
    return tuple(each for each in findings if each.severity == "error")
