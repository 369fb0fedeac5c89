"""Convergence: it always ends, and says "fits" only of what fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.agent.memory.convergence import (
    Cause,
    ConvergencePolicy,
    Kind,
    RoundStats,
    decide,
    forecast_ms,
)

MB = 1_000_000
POLICY = ConvergencePolicy()

policies = st.builds(
    ConvergencePolicy,
    max_freeze_ms=st.floats(0, 1000),
    fixed_ms=st.floats(0, 200),
    lead_ms=st.floats(0, 50),
    max_rounds=st.integers(0, 12),
    max_bytes_factor=st.floats(0.5, 20),
    growth=st.floats(0, 1),
    gain=st.floats(0, 0.9),
    patience=st.integers(1, 5),
)
rounds_of = st.lists(
    st.tuples(st.integers(0, 10**12), st.floats(0, 1e6), st.integers(0, 10**12)), min_size=0, max_size=14
).map(
    lambda rows: tuple(
        RoundStats(number, sent // 4096, sent, duration, dirty)
        for number, (sent, duration, dirty) in enumerate(rows, start=1)
    )
)


def round_(number: int, sent_mb: float, ms: float, dirty_mb: float) -> RoundStats:
    return RoundStats(number, int(sent_mb * MB) // 4096, int(sent_mb * MB), ms, int(dirty_mb * MB))


@given(rounds_of, st.integers(0, 10**12), policies)
def test_only_what_fits_freezes(rounds: tuple[RoundStats, ...], memory: int, policy: ConvergencePolicy) -> None:
    decision = decide(rounds, memory, policy)
    if decision.kind is Kind.FREEZE:
        assert decision.forecast_ms <= policy.max_freeze_ms
        assert decision.cause is Cause.FITS
    elif rounds:
        assert decision.forecast_ms > policy.max_freeze_ms


@given(rounds_of, st.integers(0, 10**12), policies)
def test_no_round_beyond_the_bound(rounds: tuple[RoundStats, ...], memory: int, policy: ConvergencePolicy) -> None:
    if len(rounds) >= policy.max_rounds:
        assert decide(rounds, memory, policy).kind is not Kind.ANOTHER_ROUND


@given(
    st.integers(1, 10**11),
    st.lists(st.tuples(st.floats(0.001, 1e5), st.floats(0, 2)), min_size=20, max_size=20),
    policies,
)
def test_it_always_ends(memory: int, weather: list[tuple[float, float]], policy: ConvergencePolicy) -> None:
    """Whatever bandwidth and dirty rate do."""
    rounds: tuple[RoundStats, ...] = ()
    pending = memory
    for number in range(1, policy.max_rounds + 2):
        if decide(rounds, memory, policy).kind is not Kind.ANOTHER_ROUND:
            return
        duration, factor = weather[number]
        left = int(pending * factor)
        rounds += (RoundStats(number, pending // 4096, pending, duration, left),)
        pending = left
    raise AssertionError("more rounds than are allowed")


@given(rounds_of, st.integers(0, 10**12), policies)
def test_the_same_question_has_the_same_answer(
    rounds: tuple[RoundStats, ...], memory: int, policy: ConvergencePolicy
) -> None:
    assert decide(rounds, memory, policy) == decide(rounds, memory, policy)


@given(st.floats(0, 1e12), st.floats(0, 1e6), st.floats(1, 1e7), st.floats(1, 1e7), policies)
def test_a_faster_link_never_makes_a_longer_freeze(
    dirty: float, rate: float, one: float, other: float, policy: ConvergencePolicy
) -> None:
    slow, fast = sorted((one, other))
    assert forecast_ms(dirty, rate, fast, policy) <= forecast_ms(dirty, rate, slow, policy)


@given(rounds_of.filter(bool), st.floats(1, 100), st.integers(0, 10**12), policies)
def test_what_freezes_freezes_on_a_faster_link(
    rounds: tuple[RoundStats, ...], factor: float, memory: int, policy: ConvergencePolicy
) -> None:
    """More sent in the same time, the same left dirty."""
    faster = tuple(replace(each, sent_bytes=int(each.sent_bytes * factor) + 1) for each in rounds)
    if (
        any(each.sent_bytes and each.duration_ms for each in rounds)
        and decide(rounds, memory, policy).kind is Kind.FREEZE
    ):
        assert decide(faster, memory, policy).kind is Kind.FREEZE


def test_the_first_round_comes_first() -> None:
    decision = decide((), 100 * MB, POLICY)
    assert (decision.kind, decision.cause) == (Kind.ANOTHER_ROUND, Cause.NOTHING_SENT)
    assert decide((), 100 * MB, replace(POLICY, max_rounds=0)).kind is Kind.GIVE_UP


@pytest.mark.parametrize(
    ("rounds", "kind", "cause"),
    [
        ([(1000, 1000, 5)], Kind.FREEZE, Cause.FITS),
        ([(1000, 1000, 300)], Kind.ANOTHER_ROUND, Cause.SHRINKING),
        ([(1000, 1000, 300), (300, 300, 90)], Kind.ANOTHER_ROUND, Cause.SHRINKING),
        ([(1000, 1000, 300), (300, 300, 340)], Kind.GIVE_UP, Cause.GROWING),
        ([(1000, 1000, 300), (300, 300, 290), (290, 290, 295)], Kind.GIVE_UP, Cause.STALLED),
        ([(1000, 1000, 900), (900, 900, 800), (800, 800, 500), (500, 500, 300)], Kind.GIVE_UP, Cause.BYTES),
    ],
)
def test_the_ends(rounds: list[tuple[float, float, float]], kind: Kind, cause: Cause) -> None:
    decision = decide(tuple(round_(n, *each) for n, each in enumerate(rounds, start=1)), 1000 * MB, POLICY)
    assert (decision.kind, decision.cause) == (kind, cause)


def test_a_fixed_cost_beyond_the_bound_is_named_at_once() -> None:
    decision = decide((round_(1, 1000, 1000, 300),), 1000 * MB, replace(POLICY, fixed_ms=80))
    assert (decision.kind, decision.cause) == (Kind.GIVE_UP, Cause.FIXED_COST)
    assert "80 ms" in decision.reason


def test_the_bound_of_rounds_is_named() -> None:
    decision = decide((round_(1, 1000, 1000, 300),), 1000 * MB, replace(POLICY, max_rounds=1))
    assert decision.cause is Cause.ROUNDS
    assert "300 MB/s" in decision.reason
