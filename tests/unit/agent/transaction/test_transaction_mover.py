"""The transaction with a mover that acts on both hosts: whatever happens, packets end up where the service runs.

`World` sends packets to the host that draws them, and `verdict` wants no other host to draw any in the end.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from coordinator.agent.fakes.clock import run
from coordinator.facts import MoverSpec
from tests.unit.agent.faults import ROLES, Fault, Role, cancel, fail, kill, noted, process, trouble
from tests.unit.agent.stage import Stage, told_outcomes, verdict

HOOK = MoverSpec(kind="hook", hook="/usr/local/sbin/move-address")


def stage_of(folder: Path) -> Stage:
    return Stage(folder, mover=HOOK)


def play(folder: Path, name: str, fault: Fault) -> str:
    stage = stage_of(folder / name)
    fault(stage)
    with noted(name, stage):
        ends = run(stage.play())
        found = verdict(stage)
        assert told_outcomes(ends) <= {found}
    return found


def moved(folder: Path) -> Stage:
    stage = stage_of(folder / "happy")
    run(stage.play())
    return stage


def test_both_ends_do_their_part_in_the_order_of_the_protocol(tmp_path: Path) -> None:
    stage = moved(tmp_path)
    assert verdict(stage) == "moved"
    verbs = {role: [v for v in process(stage, role).life.verbs if v.startswith("mover")] for role in ROLES}
    assert verbs == {role: ["mover diverts", "mover released"] for role in ROLES}
    order = ["beta: gate holding", "beta: mover diverts", "alpha: mover diverts", "alpha: gate freezing"]
    found = iter(stage.world.history)
    assert all(step in found for step in order)


@pytest.mark.parametrize("role", ROLES)
def test_cancelled_or_killed_at_every_await(tmp_path: Path, role: Role) -> None:
    steps = range(1, process(moved(tmp_path), role).life.steps + 1)
    ended = Counter(play(tmp_path, f"{kind.__name__} {n}", kind(role, n)) for n in steps for kind in (cancel, kill))
    assert set(ended) == {"moved", "rolled_back"}


@pytest.mark.parametrize("role", ROLES)
def test_every_verb_fails_once(tmp_path: Path, role: Role) -> None:
    verbs = process(moved(tmp_path), role).life.verbs
    ended = {verb: play(tmp_path, f"{n} {verb}", fail(role, n)) for n, verb in enumerate(verbs, 1)}
    assert ended["mover diverts"] == "rolled_back"
    assert ended["mover released"] == "moved"


@pytest.mark.parametrize("kind", ["cut", "drop"])
@pytest.mark.parametrize("up", [True, False], ids=["from the source", "from the destination"])
def test_every_message_is_lost(tmp_path: Path, kind: str, up: bool) -> None:
    for n, message in enumerate(moved(tmp_path).segment.sent[up], 1):
        found = play(tmp_path, f"{n}", trouble("cut" if kind == "cut" else "drop", up, n))
        assert found == ("moved" if message in ("Go", "Resumed") else "rolled_back"), message
