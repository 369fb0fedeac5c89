"""What the filler makes of the kernel's answers, in an order that the real kernel gives once in a thousand times."""

from __future__ import annotations

import errno
from typing import cast

import pytest

from coordinator.agent.memory import missing
from coordinator.agent.memory.filler import Content, Filler
from coordinator.agent.memory.pieces import Piece, Pieces

DESCRIPTOR, PID = 3, 7
HERE, THERE = 100, 500


class OnePage:
    """A store that holds one page."""

    def pieces(self, pid: int) -> Pieces:
        assert pid == PID
        return Pieces([Piece(HERE, HERE + 1, HERE)])

    def runs(self, pid: int, first: int, count: int) -> list[tuple[int, int, int]]:
        assert (pid, first, count) == (PID, HERE, 1)
        return [(HERE, 1, 1)]

    def address(self, slot: int) -> int:
        assert slot == 1
        return 0


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the kernel is going to answer: (page that it must be asked for, errno)."""
    due: list[tuple[int, int]] = []

    def copy(descriptor: int, page: int, source: int, count: int) -> tuple[int, int]:
        expected, problem = due.pop(0)
        assert (descriptor, page, count) == (DESCRIPTOR, expected, 1)
        return int(not problem), problem

    monkeypatch.setattr(missing, "copy", copy)
    monkeypatch.setattr(missing, "wake", lambda *_: None)
    return due


@pytest.fixture
def filler() -> Filler:
    made = Filler(cast(Content, OnePage()), lambda *_: None)
    made.add(DESCRIPTOR, PID, [])
    made.settled = True
    return made


def fill_all(filler: Filler) -> None:
    space = filler.spaces[DESCRIPTOR]
    while space.queue:
        filler.background(space, space.queue)
        filler.attend(space)


def test_a_page_whose_mapping_goes_elsewhere_while_it_is_copied_follows_it(
    filler: Filler, answers: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel finds no mapping, and only when asked again says that there is an event to read."""
    events = [[missing.Remap(HERE, THERE, 1)]]
    monkeypatch.setattr(missing, "read_events", lambda _: events.pop() if events else [])
    answers += [(HERE, errno.ENOENT), (HERE, errno.EAGAIN), (THERE, 0)]
    fill_all(filler)
    assert (answers, events) == ([], [])
    assert not filler.spaces[DESCRIPTOR].pieces


def test_a_page_without_a_place_is_given_up(
    filler: Filler, answers: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(missing, "read_events", lambda _: [])
    answers += [(HERE, errno.ENOENT), (HERE, errno.ENOENT)]
    fill_all(filler)
    assert not answers
    assert not filler.spaces[DESCRIPTOR].pieces
    assert "has no place" in capsys.readouterr().out
