"""In the background an agent gives way as far as it comes on at all."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import pytest

from coordinator.agent import pacing
from coordinator.agent.pacing import Pacer, Times, starves, times
from coordinator.agent.priority import Pace

MS = 1_000_000


@pytest.mark.parametrize(
    ("ran_ms", "waited_ms", "was_starved", "starved"),
    [
        (0, 0, False, False),  # there is nothing to do
        (200, 10, False, False),
        (2, 20, False, False),  # there is little to do, and others do something
        (2, 240, False, True),
        (60, 190, False, True),
        (70, 180, False, False),
        (70, 180, True, True),
        (140, 110, True, False),
        (0, 0, True, False),
    ],
)
def test_who_waits_for_most_of_the_time_is_starved(
    ran_ms: int, waited_ms: int, was_starved: bool, starved: bool
) -> None:
    before = {1: (7 * MS, 9 * MS), 2: (5 * MS, 5 * MS)}  # the second has ended meanwhile, and the third is new
    now = {1: ((7 + ran_ms) * MS, 9 * MS), 3: (0, waited_ms * MS)}
    assert starves(before, now, was_starved) is starved


def test_the_kernel_keeps_an_account() -> None:
    thread = os.getpid()
    before = times()
    assert thread in before, "this kernel has no CONFIG_SCHED_INFO"
    while times()[thread][0] < before[thread][0] + MS:
        os.getpid()


class Recorded:
    """A pacer, and what it has done to its process; ``looks`` are what the kernel says, one after the other."""

    def __init__(self, *looks: tuple[int, int]) -> None:
        self.done: list[Pace | bool] = []
        self.looked = asyncio.Event()
        self._looks = iter(looks)
        self.pacer = Pacer(self._look, self.done.append, self.done.append)

    def _look(self) -> Times:
        try:
            return {1: next(self._looks)}
        except StopIteration:
            self.looked.set()
            return {}


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recorded]:
    monkeypatch.setattr(pacing, "LOOK_S", 0.001)
    return Recorded


async def test_who_is_starved_presses_on_until_he_is_not(quickly: Callable[..., Recorded]) -> None:
    it = quickly((0, 0), (1 * MS, 300 * MS), (2 * MS, 600 * MS), (300 * MS, 601 * MS))
    it.pacer("background")
    await it.looked.wait()
    assert it.done == ["background", True, False]


async def test_whose_turn_it_is_looks_no_more(quickly: Callable[..., Recorded]) -> None:
    it = quickly((0, 0), *[(0, number * 300 * MS) for number in range(1, 1000)])
    it.pacer("background")
    it.pacer("urgent")
    await asyncio.sleep(0.01)
    assert it.done == ["background", "urgent"]


async def test_without_an_account_nothing_changes(quickly: Callable[..., Recorded]) -> None:
    it = quickly()
    it.pacer("background")
    await asyncio.sleep(0.005)
    assert it.done == ["background"]
