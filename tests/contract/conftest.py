"""What contracts share: a process to be tracked, a cable between two hosts and what is on it, a tree to be copied."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest

from coordinator.agent.memory.base import Tracker
from netfix.gate import NftGate, holding
from netfix.hold import NfqueueHold
from tests.contract.memory_target import Target, make_tracker
from tests.contract.netfix_segment import SERVICE, SERVICE6, Segment, segment
from tests.contract.two_trees import Two, rsync_to_be_found


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


@pytest.fixture
async def cable() -> AsyncIterator[Segment]:
    """A cable, and a network namespace at each end."""
    async with segment() as built:
        yield built


@pytest.fixture
async def gate(cable: Segment) -> AsyncIterator[NftGate]:
    """The host's gate for both service addresses, as it is when it is made."""
    made = await cable.host.call(lambda: NftGate("test", [SERVICE, SERVICE6]))
    yield made
    made.close()


@pytest.fixture
async def hold(cable: Segment, gate: NftGate) -> AsyncIterator[NfqueueHold]:
    """A hold that is open, behind a gate that queues."""
    made = NfqueueHold()
    await cable.host.run(made.open())
    await gate.set(holding(made.queue))
    yield made
    await cable.host.call(made.close)


@pytest.fixture(scope="module")
def rsync(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An rsync, whether this machine has one or not."""
    with rsync_to_be_found(tmp_path_factory.mktemp("bin")):
        yield


@pytest.fixture
async def two(rsync: None) -> AsyncIterator[Two]:
    """On a tmpfs: events of nobody else, and extended attributes."""
    folder = Path(mkdtemp(dir="/dev/shm", prefix="livemove-test-"))
    made = Two(folder)
    try:
        yield made
    finally:
        await made.close()
        shutil.rmtree(folder)
