"""`labs/bench connections`: many established connections, moved by livemove and under CRIU's own two network locks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from labs.benchmarks import locks
from labs.benchmarks.freeze import freeze_parts
from labs.benchmarks.measure import Row, longest_wait_ms
from labs.benchmarks.plain import LIMIT_S, PlainMove, TookTooLong
from labs.benchmarks.session import Service, Settings, fresh_lab, move, other, settle
from labs.commands import LabError

LIVEMOVE = "livemove"
LOCKS = (LIVEMOVE, "iptables", "nftables")
BEFORE_S = 1.0
AFTER_S = 1.5
MEASURED = ("freeze_ms", "longest_gap_ms", "retransmissions", "lost", "wrong_bytes")


@dataclass(frozen=True)
class ConnectionsBench:
    """How many connections to try, and for how long a plain move may go on."""

    settings: Settings
    counts: Sequence[int]
    limit_s: float = LIMIT_S

    def run(self, cases: list[Row], problems: list[str]) -> None:
        """Fill in one case for each count and lock, as they come. Each has a lab of its own: a plain move that is cut
        short leaves the hosts in a state that nobody wants to measure on."""
        for count in self.counts:
            for lock in LOCKS:
                case: Row = {"connections": count, "lock": lock, **dict.fromkeys(MEASURED)}
                cases.append(case)
                with self.settings.steps.step(f"{count} connections, lock: {lock}"):
                    self._fill(case, problems)

    def _fill(self, case: Row, problems: list[str]) -> None:
        try:
            case |= self._case(case["connections"], case["lock"])
        except TookTooLong:
            case["note"] = f"not done in {self.limit_s:g} s"
        except LabError as error:
            case["note"] = str(error).splitlines()[0]
            problems.append(f"{case['connections']} connections, {case['lock']}: {error}")
        harm = [f"{name} {case[name]}" for name in ("lost", "wrong_bytes") if case[name]]
        # What CRIU's own locks do to connections is a finding of the benchmark, not a failure of it.
        if harm and case["lock"] == LIVEMOVE:
            problems.append(f"{case['connections']} connections: {', '.join(harm)}: {'; '.join(case['troubles'])}")

    def _case(self, count: int, lock: str) -> Row:
        with fresh_lab(self.settings) as lab:
            if lock != LIVEMOVE:
                locks.install_iptables(lab)
                locks.choose(lab, lock)
            service = Service.started(lab)
            with service.asker(connections=count) as asker:
                checked_before = asker.round()
                asker.begin()
                settle(BEFORE_S)
                result = self._move(service, lock)
                settle(AFTER_S)
                seen = asker.end()
                checked_after = asker.round()
        wrong = sum(part["wrong_bytes"] for part in (checked_before, seen, checked_after))
        troubles = seen["troubles"] + checked_after["troubles"]
        return {
            **result,
            "longest_gap_ms": longest_wait_ms(seen["asked"], seen["answered"]),
            "retransmissions": seen["retransmissions"],
            "lost": count - checked_after["answered"],
            "wrong_bytes": wrong,
            "checked_before": checked_before["answered"],
            "checked_after": checked_after["answered"],
            "troubles": troubles[:8],
        }

    def _move(self, service: Service, lock: str) -> Row:
        source = service.where()
        destination = service.lab.host(other(source))
        if lock == LIVEMOVE:
            result = move(service, destination.name)
            told = {name: result[name] for name in ("mode", "freeze_ms", "total_ms", "phases")}
            return {**told, "freeze_parts": freeze_parts(service.lab, result)}
        with PlainMove(service, source, destination) as plain:
            done = plain.run(self.limit_s)
        times = {name: getattr(done, name) for name in ("dump_ms", "copy_ms", "restore_ms", "total_ms")}
        return {"mode": "plain", "freeze_ms": done.total_ms, **times}
