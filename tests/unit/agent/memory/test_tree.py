"""The tree tracker over processes that are made up: pids used again, processes that go while they are asked."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from coordinator.agent.memory import tree
from coordinator.agent.memory.base import NOT_CLOSED, PAGE_BYTES, Changes, Closed, PageRun, ProcessChanges
from coordinator.agent.memory.ptrace import TargetGone
from coordinator.agent.memory.segments import Segments
from coordinator.agent.memory.tree import TreeTracker
from coordinator.errors import TrackingFailed

NOTHING = Changes((), (), (), 0)
ALL = Changes((PageRun(PAGE_BYTES, 1),), (), (), 1)


class World:
    """Processes by pid, with their start times, and the trackers made for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started = {100: 1}
        self.zombies: set[int] = set()
        self.open: set[tuple[int, int]] = set()
        self.refused: set[int] = set()
        self.reaped: dict[int, int | None] = {}
        self.distrusted: list[bool] = []
        self.trusted: list[frozenset[int]] = []
        monkeypatch.setattr(tree, "start_time", self.started.get)
        monkeypatch.setattr(tree, "process_tree", lambda _root: [*self.started, *self.zombies])
        monkeypatch.setattr(tree, "inner_pid", lambda pid: pid - 99)
        monkeypatch.setattr(tree, "reaped_faults", lambda pid: self.reaped.get(pid, 0))
        monkeypatch.setattr(tree, "scan_all", lambda _pid: ALL)
        monkeypatch.setattr(TreeTracker, "_shares_memory", lambda *_: False)

    def make(self, pid: int) -> FakeTracker:
        if pid in self.refused:
            raise TrackingFailed(f"process {pid} is refused")
        return FakeTracker(self, pid)


class FakeTracker:
    def __init__(self, world: World, pid: int) -> None:
        self.world, self.pid, self.name = world, pid, (pid, world.started[pid])
        world.open.add(self.name)
        self.asked = False

    def collect(
        self, *, last: bool = False, others_wrote: bool = False, closed: Closed = NOT_CLOSED, frozen: object = None
    ) -> Changes:
        if (self.pid, self.world.started.get(self.pid)) != self.name:
            raise TargetGone("gone")
        self.asked, first = True, not self.asked
        self.world.distrusted.append(others_wrote)
        self.world.trusted.append(closed.segments)
        return ALL if first else NOTHING

    def close(self) -> None:
        self.world.open.discard(self.name)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_a_pid_that_is_used_again_is_another_process(world: World) -> None:
    world.started[101] = 5
    tracker = TreeTracker(100, world.make)
    assert tracker.collect()[101].fresh
    assert not tracker.collect()[101].fresh
    world.started[101] = 9
    answer = tracker.collect()[101]
    assert (answer.fresh, answer.started, answer.inner_pid) == (True, 9, 2)
    assert tracker.take_gone() == (2,)
    assert world.open == {(100, 1), (101, 9)}


def test_one_that_goes_while_it_is_asked_is_gone(world: World) -> None:
    world.started[101] = 5
    tracker = TreeTracker(100, world.make)
    del world.started[101]
    assert tracker.collect().keys() == {100}
    assert tracker.take_gone() == (2,)
    assert world.open == {(100, 1)}


def test_nothing_is_attached_in_the_last_round(world: World) -> None:
    tracker = TreeTracker(100, world.make)
    world.started[101] = 5
    answer = tracker.collect(last=True)[101]
    assert (answer.fresh, answer.changes) == (True, ALL)
    assert world.open == {(100, 1)}
    tracker.close()
    assert not world.open


def test_one_that_cannot_be_tracked_at_the_start_undoes_all(world: World) -> None:
    world.started[101] = 5
    world.refused.add(101)
    with pytest.raises(TrackingFailed):
        TreeTracker(100, world.make)
    assert not world.open


def test_one_that_cannot_be_tracked_later_is_named_and_tried_again(world: World) -> None:
    tracker = TreeTracker(100, world.make)
    world.started[101] = 5
    world.refused.add(101)
    for _ in range(2):
        answer = tracker.collect()[101]
        assert (answer.fresh, answer.untracked) == (True, "process 101 is refused")
    world.refused.clear()
    assert tracker.collect()[101].untracked is None
    assert not tracker.collect()[101].fresh


def test_whoever_goes_may_have_written_to_shared_memory(world: World) -> None:
    world.started[101] = 5
    tracker = TreeTracker(100, world.make)

    def distrusted() -> list[bool]:
        world.distrusted.clear()
        tracker.collect()
        return list(world.distrusted)

    assert distrusted() == [False, False]
    del world.started[101]  # a member
    assert [distrusted(), distrusted()] == [[True], [False]]
    world.reaped[100] = 3  # somebody unseen
    assert [distrusted(), distrusted()] == [[True], [False]]
    world.zombies.add(102)
    assert [distrusted(), distrusted()] == [[True], [False]]
    world.reaped[100] = None  # nobody can tell
    assert [distrusted(), distrusted()] == [[True], [True]]


class FakeSegments(Segments):
    """One that nobody unknown comes to."""

    def __init__(self) -> None:
        super().__init__(None)
        self.ended = False

    def untouched(self, pids: Iterable[int]) -> frozenset[int]:
        assert list(pids)
        return self.closed

    def take(self, answers: Iterable[ProcessChanges]) -> None:
        assert list(answers)
        self.closed = frozenset({7})

    def close(self) -> None:
        self.ended = True


def test_processes_are_told_which_segments_nobody_else_wrote_to(world: World) -> None:
    segments = FakeSegments()
    tracker = TreeTracker(100, world.make, segments)
    to_be_called = [tracker.at_freeze]
    assert [tracker.collect()[100].closed.segments, tracker.collect()[100].closed.segments] == [{7}, {7}]
    assert world.trusted == [frozenset(), {7}]
    assert [*to_be_called, tracker.at_freeze] == [None, segments.at_freeze]
    tracker.close()
    assert segments.ended


def test_in_the_last_look_only_what_was_untouched_is_known(world: World) -> None:
    """Nobody looks again, so that it is not enough to be closed from now on."""
    tracker = TreeTracker(100, world.make, FakeSegments())
    assert tracker.collect(last=True)[100].closed.segments == frozenset()


def test_a_root_that_is_another_process_is_gone(world: World) -> None:
    tracker = TreeTracker(100, world.make)
    world.started[100] = 2
    with pytest.raises(TargetGone):
        tracker.collect()
