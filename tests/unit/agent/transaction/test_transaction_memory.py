"""The transaction with memory that moves beside the images: the same faults, in the modes that copy before and after.

Where these modes end otherwise than stop-copy, and by design (docs/operations.md):

- From STAGED until all memory is in the tasks, the end of the destination's agent is theirs too, because the guard
  kills tasks whose memory cannot come any more. Before the commit point that is a roll-back; after it the service is
  `lost`.
- With post-copy and hybrid, so is the loss of the source, or of the link to it, in that time.
- With pre-copy nothing of the source is needed after the commit point: its loss harms nobody.

`lost` is never hidden: the destination says MEMORY_LOST, and the migration is in doubt. Never is there a second copy,
and never one with other memory: `World` compares every page with what was frozen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.agent.fakes.channel import Trouble
from coordinator.agent.fakes.clock import run
from coordinator.agent.fakes.workload import is_lazy
from coordinator.agent.memory.runs import spans_of
from coordinator.journal import Phase
from coordinator.protocol import HalfResult, MemoryPolicy, Mode
from tests.unit.agent.faults import (
    ROLES,
    Fault,
    Role,
    both,
    cancel,
    fail,
    fail_later,
    happy,
    kill,
    kill_later,
    other,
    play,
    process,
    steps,
    trouble,
)
from tests.unit.agent.stage import Stage, phase_of, told_outcomes, verdict

MODES: tuple[Mode, ...] = ("pre-copy", "post-copy", "hybrid")
#: How many awaits lie between two that are tried: all where the modes differ most, a sample in what is both of them.
STRIDES: dict[Mode, int] = {"pre-copy": 1, "post-copy": 1, "hybrid": 4}
FETCHING: tuple[Mode, ...] = ("post-copy", "hybrid")


def verdicts(folder: Path, faults: Iterator[tuple[str, Fault]], mode: Mode) -> Counter[str]:
    return Counter(found for _, _, found in play(folder, faults, mode))


def sampled(role: Role, mode: Mode, stride: int | None = None) -> range:
    return steps(role, mode)[:: stride or STRIDES[mode]]


def in_order(history: list[str], order: list[str]) -> bool:
    found = iter(history)
    return all(step in found for step in order)


@pytest.mark.parametrize("mode", ["stop-copy", *MODES])
def test_without_a_fault(tmp_path: Path, mode: Mode) -> None:
    stage = Stage(tmp_path, memory=MemoryPolicy(mode=mode))
    ends = run(stage.play())
    assert told_outcomes(ends) == {verdict(stage)} == {"moved"}
    source, destination = ends
    assert isinstance(source, HalfResult)
    assert isinstance(destination, HalfResult)
    assert source.warnings == destination.warnings == ()
    assert source.mode == mode
    assert bool(source.rounds) == (mode in ("pre-copy", "hybrid"))
    assert source.pre_copy_bytes == sum(each.bytes for each in source.rounds)
    world = stage.world
    assert world.destination.memory == world.frozen
    assert any(is_lazy(page) for page in world.frozen)
    # No packet met a closed door, and the service got each once, in order.
    assert world.dropped == []
    assert world.delivered == sorted(set(world.delivered))
    order = [
        "beta: hold opened",
        "alpha: gate silent",
        "beta: gate holding",
        "alpha: gate freezing",
        "alpha: the copy is frozen",
        "beta: the copy is held",
        "beta: gate releasing",
        "beta: the copy is running",
        "beta: gate open",
        "beta: hold released",
        *(["beta: a page is filled in"] if mode != "stop-copy" else []),
        "beta: gate removed",
    ]
    assert in_order(world.history, order)
    if mode in FETCHING:  # the frozen tasks are needed until the last page is there
        assert in_order(world.history, ["beta: a page is filled in", "alpha: the copy is absent"])
        last = max(number for number, line in enumerate(world.history) if "page is filled" in line)
        assert world.history.index("alpha: the copy is absent") > last


def test_a_criu_that_cannot_be_kept_from_looking_at_pages(tmp_path: Path) -> None:
    """It takes longer, and that is all."""
    stage = Stage(tmp_path, memory=MemoryPolicy(mode="pre-copy"))
    stage.world.source.refusal = "fanotify: Operation not permitted"
    source, destination = run(stage.play())
    assert isinstance(source, HalfResult)
    assert isinstance(destination, HalfResult)
    assert verdict(stage) == "moved"
    (warning,) = source.warnings
    assert stage.world.source.refusal in warning
    assert destination.warnings == ()


def test_pages_that_nobody_would_bring_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory hidden by mistake is in no image, and the destination would not miss it: never committed."""
    monkeypatch.setattr("coordinator.agent.memory.hidden_pages.hideable", spans_of)
    stage = Stage(tmp_path, memory=MemoryPolicy(mode="pre-copy"))
    source, _ = run(stage.play())
    assert isinstance(source, HalfResult)
    assert source.error is not None
    assert (verdict(stage), source.error["code"]) == ("rolled_back", "TRACKING_FAILED")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("role", ROLES)
def test_cancelled_at_every_await(tmp_path: Path, role: Role, mode: Mode) -> None:
    """Also between STAGED and GO, and while memory is filled in: then it comes too late."""
    faults = ((f"cancel {role} at {n}", cancel(role, n)) for n in sampled(role, mode))
    assert set(verdicts(tmp_path, faults, mode)) == {"moved", "rolled_back"}


@pytest.mark.parametrize("mode", MODES)
def test_the_source_is_killed_at_every_await(tmp_path: Path, mode: Mode) -> None:
    faults = ((f"kill source at {n}", kill("source", n)) for n in sampled("source", mode))
    expected = {"moved", "rolled_back", "lost"} if mode in FETCHING else {"moved", "rolled_back"}
    assert set(verdicts(tmp_path, faults, mode)) == expected


@pytest.mark.parametrize("mode", MODES)
def test_the_destination_is_killed_at_every_await(tmp_path: Path, mode: Mode) -> None:
    faults = ((f"kill destination at {n}", kill("destination", n)) for n in sampled("destination", mode))
    lost = {"lost"} if mode != "pre-copy" else set()  # with all pages in the store nobody needs the agent
    assert set(verdicts(tmp_path, faults, mode)) == {"moved", "rolled_back", *lost}


def test_a_staged_copy_whose_guard_has_killed_it_is_no_loss_before_the_commit_point(tmp_path: Path) -> None:
    """The source, which has heard of nothing but a dead link, rolls back."""
    killed = 0
    faults = ((f"kill destination at {n}", kill("destination", n)) for n in steps("destination", "hybrid"))
    for _, stage, found in play(tmp_path, faults, "hybrid"):
        if stage.world.killed and not stage.world.committed:
            killed += 1
            assert found == "rolled_back"
            assert phase_of(stage.world.source) is Phase.ROLLED_BACK
    assert killed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("role", ROLES)
def test_every_verb_fails_once(tmp_path: Path, role: Role, mode: Mode) -> None:
    """After the commit point only two failures cost the service: a restore that does not resume its tasks, and, where
    pages are fetched, a source that cannot read them."""
    verbs = process(happy(mode), role).life.verbs
    faults = ((f"{role}: {verb} fails", fail(role, n)) for n, verb in enumerate(verbs, 1))
    for name, _, found in play(tmp_path, faults, mode):
        costly = mode in FETCHING and any(verb in name for verb in ("pages read", "criu connects", "criu resumes"))
        assert found in ({"lost", "rolled_back"} if costly else {"moved", "rolled_back"}), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["cut", "stall"])
@pytest.mark.parametrize("up", [True, False], ids=["from the source", "from the destination"])
def test_the_link_is_lost_at_every_message(tmp_path: Path, kind: Trouble, up: bool, mode: Mode) -> None:
    """Up to Staged that is a roll-back. From Go on the destination of a pre-copy does not need the link, while one that
    fetches pages is lost with it, as it is when Go never comes."""
    messages = happy(mode).segment.sent[up]
    decided = messages.index("Go" if up else "Resumed") + 1
    faults = ((f"{n}: {kind} {message}", trouble(kind, up, n)) for n, message in enumerate(messages, 1))
    for number, (name, _, found) in enumerate(play(tmp_path, faults, mode), 1):
        if number < decided:
            assert found == "rolled_back", name
        elif mode == "pre-copy" or name.endswith("FilledIn"):
            assert found == "moved", name
        else:
            assert found == "lost" or (number == decided and not up), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("then", ["kill", "fail"])
def test_in_trouble_again_while_rolling_back(tmp_path: Path, role: Role, mode: Mode, then: str) -> None:
    again = kill_later if then == "kill" else fail_later

    def faults() -> Iterator[tuple[str, Fault]]:
        for step in sampled(role, mode, 9):
            for after in (2, 5):
                yield f"cancel {role} at {step}, {then} +{after}", cancel(role, step, again(after))

    assert set(verdicts(tmp_path, faults(), mode)) <= {"moved", "rolled_back", "lost"}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    mode=st.sampled_from(MODES),
    first=st.sampled_from(ROLES),
    at=st.tuples(st.integers(1, 160), st.integers(1, 160)),
    kinds=st.tuples(st.sampled_from(["cancel", "kill"]), st.sampled_from(["kill", "cut", "stall"])),
    up=st.booleans(),
)
def test_any_two_faults(mode: Mode, first: Role, at: tuple[int, int], kinds: tuple[str, str], up: bool) -> None:
    one = cancel(first, at[0]) if kinds[0] == "cancel" else kill(first, at[0])
    two = {
        "kill": kill(other(first), at[1]),
        "cut": trouble("cut", up, at[1] % 30 + 1),
        "stall": trouble("stall", up, at[1] % 30 + 1),
    }[kinds[1]]
    name = f"{mode} {kinds} {first} {at} {up}"
    with TemporaryDirectory() as folder:
        found = verdicts(Path(folder), iter([(name, both(one, two))]), mode)
        assert set(found) <= {"moved", "rolled_back", "lost"}


@pytest.mark.parametrize(
    ("give_up", "outcome"), [("freeze", "moved"), ("post-copy", "moved"), ("abort", "rolled_back")]
)
def test_a_service_that_writes_faster_than_it_is_copied(tmp_path: Path, give_up: str, outcome: str) -> None:
    policy = MemoryPolicy(mode="pre-copy", max_rounds=1, max_freeze_ms=1e-9, give_up=give_up)  # type: ignore[arg-type]
    stage = Stage(tmp_path, memory=policy)
    source, _ = run(stage.play())
    assert isinstance(source, HalfResult)
    assert verdict(stage) == source.outcome == outcome
    if give_up == "abort":
        assert source.error is not None
        assert source.error["code"] == "NOT_CONVERGING"
    else:
        assert source.mode == ("hybrid" if give_up == "post-copy" else "pre-copy")
        assert any("pre-copy gave up" in warning for warning in source.warnings)
