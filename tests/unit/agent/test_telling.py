"""When a half tells of what happens: at once, but in the freeze, which others wait for, a little later."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from coordinator.agent.fakes.clock import run
from coordinator.agent.fakes.host import fake_adapters
from coordinator.agent.fakes.world import Life, World
from coordinator.agent.half import LONG_FREEZE_S, Half
from coordinator.agent.source import SourceHalf
from coordinator.events import Event
from coordinator.journal import Journal, Phase
from coordinator.wire import encode
from tests.unit.agent.stage import make_plan

Steps = Callable[[Half, list[str]], Coroutine[Any, Any, None]]


def told(folder: Path, steps: Steps) -> list[str]:
    """What was told in the end of what a half did."""
    names: list[str] = []

    def sink(event: Event) -> None:
        names.append(event.detail or event.name)

    async def play() -> None:
        plan = make_plan()
        world = World(folder, plan)
        journal = Journal.create(world.source.state, plan.id, "source", encode(plan))
        adapters = fake_adapters(Life(world, world.source), plan, "source")
        loop = asyncio.get_running_loop()
        half = SourceHalf("alpha", plan, journal, adapters, sink=sink, clock=loop.time)
        try:
            for phase in BEFORE:
                half.enter(phase)
            await steps(half, names)
        finally:
            journal.close()

    run(play())
    return names


BEFORE = [Phase.PREPARED, Phase.COPYING, Phase.DIVERTED]
FREEZE = [Phase.FROZEN, Phase.DUMPED, Phase.STAGED, Phase.COMMITTED, Phase.RESUMED]


def freeze(half: Half, until: Phase = Phase.RESUMED) -> None:
    for phase in FREEZE[: FREEZE.index(until) + 1]:
        half.enter(phase)
        half.progress("images", 1, 1)


@pytest.mark.parametrize(("until", "after"), [(Phase.RESUMED, Phase.RELEASED), (Phase.DUMPED, Phase.ABORTED)])
def test_phases_of_a_short_freeze_are_told_in_their_order_when_it_is_over(
    tmp_path: Path, until: Phase, after: Phase
) -> None:
    async def steps(half: Half, names: list[str]) -> None:
        assert names == BEFORE
        freeze(half, until)
        await asyncio.sleep(0.9 * LONG_FREEZE_S)
        assert names == BEFORE
        half.enter(after)
        half.progress("images", 1, 1)

    assert told(tmp_path, steps) == [*BEFORE, *FREEZE[: FREEZE.index(until) + 1], after, "images"]


def test_a_freeze_that_becomes_long_is_told_of(tmp_path: Path) -> None:
    async def steps(half: Half, names: list[str]) -> None:
        half.enter(Phase.FROZEN)
        await asyncio.sleep(1.1 * LONG_FREEZE_S)
        assert names == [*BEFORE, "FROZEN"]
        half.progress("images", 1, 1)

    assert told(tmp_path, steps) == [*BEFORE, "FROZEN", "images"]


def test_the_end_of_a_half_tells_everything(tmp_path: Path) -> None:
    async def steps(half: Half, _: list[str]) -> None:
        freeze(half)
        half.result("in_doubt")

    assert told(tmp_path, steps) == [*BEFORE, *FREEZE]


def test_a_warning_is_told_at_once_behind_what_was_before_it(tmp_path: Path) -> None:
    async def steps(half: Half, _: list[str]) -> None:
        half.enter(Phase.FROZEN)
        half.warn("look")

    assert told(tmp_path, steps) == [*BEFORE, "FROZEN", "look"]
