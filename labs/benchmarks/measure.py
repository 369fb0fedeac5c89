"""What the benchmarks compute: gaps, percentiles, medians. Pure; all times are CLOCK_MONOTONIC seconds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Number = float | None
Row = dict[str, Any]


@dataclass(frozen=True)
class Gap:
    """A time without any answer."""

    start: float
    end: float

    @property
    def ms(self) -> float:
        return round((self.end - self.start) * 1000, 3)


def longest_gap(began: float, answered: Iterable[float]) -> Gap:
    """The longest silence between two answers since `began`."""
    longest, last = Gap(began, began), began
    for when in answered:
        if when - last > longest.end - longest.start:
            longest = Gap(last, when)
        last = max(last, when)
    return longest


def longest_wait_ms(asked: Sequence[float], answered: Sequence[float]) -> float:
    """How long the slowest answer took."""
    waits = (end - start for start, end in zip(asked, answered, strict=True))
    return round(max(waits, default=0.0) * 1000, 3)


def answer_times_ms(asked: Sequence[float], answered: Sequence[float], since: float, until: float) -> list[float]:
    """How long the answers took to what was asked, and answered, between two moments."""
    pairs = zip(asked, answered, strict=True)
    return [(end - start) * 1000 for start, end in pairs if start >= since and end <= until]


def percentile(values: Sequence[float], percent: float) -> Number:
    """The smallest value that `percent` of all do not exceed; None of nothing."""
    if not values:
        return None
    place = math.ceil(len(values) * percent / 100) - 1
    return round(sorted(values)[max(place, 0)], 3)


def median(values: Iterable[Number]) -> Number:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 3) if known else None


def spread(values: Iterable[Number]) -> list[float] | None:
    """The smallest and the largest."""
    known = [value for value in values if value is not None]
    return [min(known), max(known)] if known else None


def ratio(value: Number, other: Number) -> Number:
    return None if value is None or not other else round(value / other, 4)


def phase(result: Row, name: str) -> tuple[float, float] | None:
    """Begin and length of a phase in a result of livemove, in seconds since its half began; None if it was not run."""
    for each in result.get("phases", ()):
        if each["name"] == name:
            return each["start_ms"] / 1000, each["ms"] / 1000
    return None


def copying(result: Row, gap: Gap) -> tuple[float, float] | None:
    """When livemove copied memory while the service ran: the phase COPYING, placed on the client's clock.

    The two clocks meet where the service froze: there the client's gap begins. None: nothing was copied before.
    """
    copied, frozen = phase(result, "COPYING"), phase(result, "FROZEN")
    if not copied or not frozen or not copied[1] or not result["bytes"]["pre_copy"]:
        return None
    since = gap.start - (frozen[0] - copied[0])
    return since, min(since + copied[1], gap.start)
