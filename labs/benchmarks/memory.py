"""`labs/bench memory`: what the memory of a service costs its clients, with livemove and plainly in turn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from labs import workloads
from labs.benchmarks import locks
from labs.benchmarks.freeze import freeze_parts, median_parts
from labs.benchmarks.measure import (
    Gap,
    Number,
    Row,
    answer_times_ms,
    copying,
    longest_gap,
    median,
    percentile,
    phase,
    ratio,
    spread,
)
from labs.benchmarks.plain import PlainMove, sweep
from labs.benchmarks.session import Meter, Service, Settings, fresh_lab, move, other, settle
from labs.clients.control import check_memory
from labs.commands import LabError
from labs.lab import Lab
from labs.programs.ballast import PAGE_BYTES

LIVEMOVE, PLAIN = "livemove", "plain"
BEFORE_S = 2.0
AFTER_S = 2.0
"""How long the clients go on after a move: a second move while their TCP still backs off would double its gap."""

AT_ONCE = 512
"""The client keeps asking every 2 ms even if answers are late, so that every late one is in the percentiles."""


Memory = Literal["private", "shared", "memfd", "tmpfs"]
PROGRAMS: dict[Memory, str] = {
    "private": "pattern_server",
    "shared": "shared_server",
    "memfd": "memfd_server",
    "tmpfs": "tmpfs_server",
}


@dataclass(frozen=True)
class MemoryBench:
    """Sizes to try, how fast the service writes, and how often each move is measured."""

    settings: Settings
    sizes_mb: Sequence[int]
    dirty_mb_s: float
    runs: int
    memory: Memory = "private"

    def run(self, cases: list[Row], problems: list[str]) -> None:
        """Fill in one case a size, as they come."""
        with fresh_lab(self.settings) as lab:
            with self.settings.steps.step("iptables, which CRIU's default lock wants"):
                locks.install_iptables(lab)
            for size_mb in self.sizes_mb:
                with self.settings.steps.step(f"{size_mb} MB, {self.runs} × livemove and plain in turn"):
                    cases.append(self._case(lab, size_mb, problems))

    def _case(self, lab: Lab, size_mb: int, problems: list[str]) -> Row:
        service = self._started(lab, size_mb)
        used_mb = service.used_memory_mb()
        taken: dict[str, list[Row]] = {LIVEMOVE: [], PLAIN: []}
        for number in range(self.runs):
            # Each kind goes each way in turn, and neither always comes after the other.
            for kind in (LIVEMOVE, PLAIN)[:: 1 if number % 2 == 0 else -1]:
                try:
                    row = self._one(service, kind)
                except LabError as error:
                    problems.append(f"{size_mb} MB, run {number + 1}, {kind}: {error}")
                    service = self._started(lab, size_mb)
                    continue
                taken[kind].append(row)
                self.settings.steps.note(
                    f"{kind}: longest gap {row['longest_gap_ms']:.0f} ms, freeze {row['freeze_ms']:.0f} ms"
                )
                problems += [f"{size_mb} MB, {kind}: {trouble}" for trouble in row.pop("troubles")]
        workloads.stop(lab, service.workload)
        return {
            "memory_mb": size_mb,
            "memory": self.memory,
            "used_memory_mb": used_mb,
            "dirty_mb_s": self.dirty_mb_s,
            "mode": "/".join(sorted({row["mode"] for row in taken[LIVEMOVE]})) or self.settings.mode,
            "freeze_parts": median_parts([row.pop("freeze_parts") for row in taken[LIVEMOVE]]),
            LIVEMOVE: summary(taken[LIVEMOVE], used_mb),
            PLAIN: summary(taken[PLAIN], used_mb),
            **ratios(taken[LIVEMOVE], taken[PLAIN]),
        }

    def _started(self, lab: Lab, size_mb: int) -> Service:
        return Service.started(lab, memory_mb=size_mb, dirty_mb_s=self.dirty_mb_s, program=PROGRAMS[self.memory])

    def _one(self, service: Service, kind: str) -> Row:
        """One move under the eyes of a client, and what it looked like."""
        source, address = service.where(), service.address
        destination = service.lab.host(other(source))
        with service.asker(at_once=AT_ONCE) as asker:
            settle(AFTER_S / 2)
            asker.begin()
            settle(BEFORE_S)
            meters = Meter.read(source), Meter.read(destination)
            moving_at = time.monotonic()
            if kind == LIVEMOVE:
                result = move(service, destination.name)
            else:
                with PlainMove(service, source, destination) as plain:
                    moving_at = time.monotonic()
                    result = vars(plain.run()) | {"mode": PLAIN}
                for host in (source, destination):
                    sweep(host)
            used = Meter.read(source) - meters[0], Meter.read(destination) - meters[1]
            settle(AFTER_S)
            seen = asker.end()
        checked = check_memory(service.lab, address, workloads.PORT)
        row = observed(seen, result, moving_at) | {
            "cpu_source_s": used[0].cpu_s,
            "cpu_destination_s": used[1].cpu_s,
            "cpu_s": round(used[0].cpu_s + used[1].cpu_s, 3),
            "bytes_sent": used[0].sent_bytes if kind == LIVEMOVE else result["image_bytes"],
        }
        if kind == LIVEMOVE:
            row["freeze_parts"] = freeze_parts(service.lab, result)
        row["wrong_bytes"] += checked["wrong_pages"] * PAGE_BYTES
        if checked["wrong_pages"]:
            row["troubles"].append(f"{checked['wrong_pages']} of {checked['pages']} pages are wrong")
        if row["lost"]:
            with suppress(LabError):
                workloads.stop(service.lab, service.workload)
            raise LabError(f"the client's connection was lost: {'; '.join(seen['troubles'])}")
        return row


def observed(seen: Row, result: dict[str, Any], moving_at: float) -> Row:
    """What the client saw and what the mover said, in one row."""
    asked, answered = seen["asked"], seen["answered"]
    gap = longest_gap(seen["began"], answered)
    before = answer_times_ms(asked, answered, seen["began"], moving_at)
    row: Row = {"mode": result["mode"], "longest_gap_ms": gap.ms, "total_ms": result["total_ms"]}
    # Of a plain migration nobody says when the tasks stood still: from its first command to its last, at most.
    row["freeze_ms"] = result.get("freeze_ms", result["total_ms"])
    row |= {f"p{percent}_before_ms": percentile(before, percent) for percent in (50, 99)}
    row |= while_copying(asked, answered, result, gap)
    row |= {name: seen[name] for name in ("wrong_bytes", "lost", "retransmissions", "troubles")}
    row["rounds"] = len(result.get("rounds", ()))
    for name in ("dump_ms", "copy_ms", "restore_ms"):
        row[name] = result.get(name)
    for name in ("COPYING", "DIVERTED", "FROZEN", "DUMPED", "STAGED", "COMMITTED"):
        times = phase(result, name)
        row[f"{name.lower()}_ms"] = times and round(times[1] * 1000, 3)
    return row


def while_copying(asked: list[float], answered: list[float], result: Row, gap: Gap) -> Row:
    """Percentiles of the answer time while memory was copied and the service ran; None where there is no such time."""
    window = copying(result, gap) if "phases" in result else None
    times = answer_times_ms(asked, answered, *window) if window else []
    return {f"p{percent}_copying_ms": percentile(times, percent) for percent in (50, 99)}


def summary(rows: list[Row], used_mb: float) -> Row:
    """Medians of several moves, with their spreads; what may not happen is added up."""
    counts = ("wrong_bytes", "lost")
    names = [name for name in rows[0] if name not in (*counts, "mode", "troubles")] if rows else []
    result: Row = {name: median(row[name] for row in rows) for name in names}
    result = {name: value for name, value in result.items() if value is not None or not name.endswith("ed_ms")}
    result |= {name: sum(row[name] for row in rows) for name in counts}
    sent: Number = result.get("bytes_sent")
    result["bytes_sent"] = None if sent is None else int(sent)
    result["sent_per_used_memory"] = ratio(sent, used_mb * (1 << 20))
    result["spread"] = {name: spread(row[name] for row in rows) for name in names if result.get(name) is not None}
    result["runs"] = len(rows)
    return result


def ratios(moved: list[Row], plain: list[Row]) -> Row:
    """livemove's longest gap ÷ that of a plain move, of the medians; and the spread of the pairs' ratios."""
    gaps = [[row["longest_gap_ms"] for row in rows] for rows in (moved, plain)]
    pairs = [ratio(one, two) for one, two in zip(*gaps, strict=False)]
    return {"gap_ratio": ratio(median(gaps[0]), median(gaps[1])), "gap_ratio_spread": spread(pairs)}
