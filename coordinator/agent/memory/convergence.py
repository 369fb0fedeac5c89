"""When to stop copying memory and freeze (pure).

Each round copies what the round before left dirty, while the service goes on writing. The freeze has to copy what the
last round left, so its length can be forecast: a fixed cost, and the bytes left over, by the bandwidth seen so far.

The rule: freeze as soon as the forecast fits ``max_freeze_ms``. Give up once another round promises nothing: the rounds
are used up, more was sent than the memory is worth, or what is left shrinks no more. P.Haul has the same three ends (at
most 8 rounds, few pages, growth by more than 10 %, phaul/iters.py) but freezes at each of them, however long that
takes; here the caller decides what giving up means.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

#: A round cannot be shorter: clocks are not that exact.
_LEAST_MS = 0.001


class Kind(StrEnum):
    """What to do next."""

    ANOTHER_ROUND = "another_round"
    FREEZE = "freeze"
    GIVE_UP = "give_up"


class Cause(StrEnum):
    """Why; the codes are stable."""

    NOTHING_SENT = "nothing_sent"  # the first round is to come
    FITS = "fits"
    SHRINKING = "shrinking"  # it does not fit yet, but another round helps
    FIXED_COST = "fixed_cost"  # the freeze takes too long even with nothing to send
    ROUNDS = "rounds"
    BYTES = "bytes"
    GROWING = "growing"
    STALLED = "stalled"


@dataclass(frozen=True, slots=True)
class RoundStats:
    """A finished round: what it sent, how long that took, and what it left dirty behind it."""

    number: int  # from 1
    pages: int  # sent
    sent_bytes: int  # on the wire
    duration_ms: float  # from asking the tracker until the other side had all
    dirty_bytes: int  # written meanwhile, and not sent yet


@dataclass(frozen=True, slots=True)
class ConvergencePolicy:
    """The bounds of copying. Sizes in bytes, times in milliseconds."""

    max_freeze_ms: float = 50.0
    fixed_ms: float = 20.0  # of a freeze with nothing to send: stopping, dumping, restoring, switching over
    lead_ms: float = 5.0  # between the last look at the pages and the freeze: the service writes on
    max_rounds: int = 8
    max_bytes_factor: float = 3.0  # of the memory: all rounds together
    growth: float = 0.10  # a round that leaves more than the one before by this part does harm
    gain: float = 0.10  # a round that leaves less by at least this part helps
    patience: int = 2  # rounds in a row that may help less
    assumed_bytes_per_ms: float = 100_000.0  # before anything was measured: 100 MB/s


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do next, why, and how long a freeze now would be."""

    kind: Kind
    cause: Cause
    reason: str  # for a person
    forecast_ms: float


def forecast_ms(
    dirty_bytes: float, dirty_bytes_per_ms: float, bandwidth_bytes_per_ms: float, policy: ConvergencePolicy
) -> float:
    """How long a freeze now would be: the fixed cost, and sending what is dirty now and until everything stands."""
    remaining = dirty_bytes + dirty_bytes_per_ms * policy.lead_ms
    return policy.fixed_ms + remaining / bandwidth_bytes_per_ms


def bandwidth_bytes_per_ms(rounds: tuple[RoundStats, ...], policy: ConvergencePolicy) -> float:
    """Bandwidth over all rounds: the large ones weigh most, for a round of few pages is mostly waiting."""
    sent = sum(each.sent_bytes for each in rounds)
    duration = sum(max(each.duration_ms, _LEAST_MS) for each in rounds)
    return sent / duration if sent > 0 else policy.assumed_bytes_per_ms


def decide(rounds: tuple[RoundStats, ...], memory_bytes: int, policy: ConvergencePolicy) -> Decision:
    """What to do after these rounds. ``memory_bytes``: what the workload holds.

    Never another round at ``max_rounds`` or beyond, so that copying always ends; ``FREEZE`` only if the forecast
    fits."""
    if not rounds:
        forecast = forecast_ms(memory_bytes, 0.0, policy.assumed_bytes_per_ms, policy)
        if policy.max_rounds < 1:
            return Decision(Kind.GIVE_UP, Cause.ROUNDS, "no round is allowed", forecast)
        return Decision(Kind.ANOTHER_ROUND, Cause.NOTHING_SENT, "the first round is to come", forecast)
    last = rounds[-1]
    bandwidth = bandwidth_bytes_per_ms(rounds, policy)
    rate = last.dirty_bytes / max(last.duration_ms, _LEAST_MS)
    forecast = forecast_ms(last.dirty_bytes, rate, bandwidth, policy)
    if forecast <= policy.max_freeze_ms:
        reason = f"a freeze of {forecast:.0f} ms fits {policy.max_freeze_ms:g} ms"
        return Decision(Kind.FREEZE, Cause.FITS, reason, forecast)
    cause = _obstacle(rounds, memory_bytes, policy)
    if cause is None:
        reason = f"a freeze of {forecast:.0f} ms does not fit {policy.max_freeze_ms:g} ms yet"
        return Decision(Kind.ANOTHER_ROUND, Cause.SHRINKING, reason, forecast)
    speeds = f"written at {rate / 1000:.0f} MB/s, sent at {bandwidth / 1000:.0f} MB/s"
    reason = _explain(cause, rounds, memory_bytes, policy, speeds)
    return Decision(
        Kind.GIVE_UP,
        cause,
        f"{reason}: a freeze would take {forecast:.0f} ms, not {policy.max_freeze_ms:g} ms",
        forecast,
    )


def _obstacle(rounds: tuple[RoundStats, ...], memory_bytes: int, policy: ConvergencePolicy) -> Cause | None:
    """Why another round makes no sense, or ``None``."""
    if policy.fixed_ms > policy.max_freeze_ms:
        return Cause.FIXED_COST
    if len(rounds) >= policy.max_rounds:
        return Cause.ROUNDS
    if sum(each.sent_bytes for each in rounds) + rounds[-1].dirty_bytes > policy.max_bytes_factor * memory_bytes:
        return Cause.BYTES
    left = [each.dirty_bytes for each in rounds]
    if len(left) >= 2 and left[-1] > left[-2] * (1 + policy.growth):
        return Cause.GROWING
    if len(left) > policy.patience and min(left[-policy.patience :]) > min(left[: -policy.patience]) * (
        1 - policy.gain
    ):
        return Cause.STALLED
    return None


def _explain(
    cause: Cause, rounds: tuple[RoundStats, ...], memory_bytes: int, policy: ConvergencePolicy, speeds: str
) -> str:
    sent = sum(each.sent_bytes for each in rounds)
    match cause:
        case Cause.FIXED_COST:
            return f"a freeze takes {policy.fixed_ms:g} ms with nothing left to send"
        case Cause.ROUNDS:
            return f"{len(rounds)} rounds were not enough ({speeds})"
        case Cause.BYTES:
            return f"{sent / 1e6:.0f} MB were sent for a memory of {memory_bytes / 1e6:.0f} MB ({speeds})"
        case Cause.GROWING:
            return f"round {rounds[-1].number} left more than the one before ({speeds})"
        case _:
            return f"the last {policy.patience} rounds hardly helped ({speeds})"
