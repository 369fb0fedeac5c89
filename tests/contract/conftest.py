"""What the contracts of memory tracking share: a process to be tracked, and its tracker."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from coordinator.agent.memory.base import Tracker
from tests.contract.memory_target import Target, make_tracker


@pytest.fixture
def target() -> Iterator[Target]:
    """A process that does what it is told."""
    with Target() as started:
        yield started


@pytest.fixture
def tracker(target: Target) -> Iterator[Tracker]:
    """A tracker of it, closed at the end."""
    with contextlib.closing(make_tracker(target.pid)) as made:
        yield made
