"""Memfds over real processes: which have lost their descriptors, and that of those every change is named."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from coordinator.agent.memory.base import PAGE_BYTES
from coordinator.agent.memory.memfds import Memfds, held_by, held_outside
from coordinator.agent.memory.tree import TreeTracker
from coordinator.agent.memory.write_protect import WriteProtectTracker
from coordinator.agent.other_processes import descriptors
from tests.contract.memory_target import CHOICE, Target, within

#: A memfd, mapped.
PROGRAM = """
import socket
fd = os.memfd_create('kept')
os.ftruncate(fd, PAGES * PAGE)
inode = os.fstat(fd).st_ino
start = area(PAGES, SHARED, fd)
"""
PAGES = 16


@pytest.fixture
def target() -> Iterator[Target]:
    with Target() as made:
        made.run(f"exec({PROGRAM.replace('PAGES', str(PAGES))!r}, globals())")
        yield made


def test_a_memfd_has_a_descriptor_until_it_is_closed(target: Target) -> None:
    inode = target.run("inode")
    assert held_by([target.pid]) == frozenset({inode})
    assert held_outside([inode], [target.pid]) == frozenset()
    target.run("os.close(fd)")
    assert held_by([target.pid]) == frozenset()


def test_a_descriptor_on_its_way_may_be_of_any(target: Target) -> None:
    target.run("exec('left, right = socket.socketpair()', globals())")
    assert held_by([target.pid]) == frozenset({target.run("inode")})
    target.run("(socket.send_fds(left, [b'x'], [fd]), os.close(fd))[1]")
    assert held_by([target.pid]) is None
    target.run("exec('_, got, _, _ = socket.recv_fds(right, 1, 1)', globals())")
    assert held_by([target.pid]) == frozenset({target.run("inode")})


def test_one_outside_who_has_or_maps_it_is_seen(target: Target) -> None:
    inode = target.run("inode")
    child = target.fork()
    assert held_outside([inode, 1], [child]) == {inode}  # the parent has a descriptor
    target.run("os.close(fd)")
    assert held_outside([inode], [child]) == {inode}  # and a mapping
    assert held_outside([inode], [child, target.pid]) == frozenset()


def test_of_a_process_that_is_gone_nothing_is_known() -> None:
    with Target() as target:
        pid = target.pid
    assert held_by([pid]) == frozenset()
    assert held_outside([], [os.getpid()]) == frozenset()


def test_of_a_process_that_goes_meanwhile_nothing_more_is_known() -> None:
    with Target() as target:
        found = descriptors(target.pid)
        first, _ = next(found)
    assert [first, *found] == [first]


class Looks:
    """Looks at a target and its children: which pages of the memfd are named, and whether it is closed."""

    def __init__(self, target: Target, tree: TreeTracker) -> None:
        self._target, self._tree = target, tree
        self.compared = False
        self._start, self._inode = target.run("start"), target.run("inode")

    def look(self, *, last: bool = False) -> tuple[set[int], bool]:
        answers = self._tree.collect(last=last)
        named = {
            (address - self._start) // PAGE_BYTES
            for each in answers.values()
            for address in within(each.changes.dirty, self._start, PAGES)
        }
        closed = answers[self._target.pid].closed
        self.compared = self._inode in closed.compared
        return named, self._inode in closed.memfds


@pytest.fixture
def looks(target: Target) -> Iterator[Looks]:
    if CHOICE.name != "write_protect":
        pytest.skip(CHOICE.reason)
    tree = TreeTracker(target.pid, WriteProtectTracker, memfds=Memfds())
    yield Looks(target, tree)
    tree.close()


def test_without_a_descriptor_every_write_is_named_and_nothing_else(target: Target, looks: Looks) -> None:
    target.run(f"(put(start, 7, {PAGES}), os.close(fd))[1]")
    everything = set(range(PAGES))
    assert looks.look() == (everything, True)
    looks.look()
    assert looks.look() == (set(), True)
    target.run("put(start + 3 * PAGE, 8)")
    assert looks.look() == ({3}, True)
    target.fork("put(start + 5 * PAGE, 9)")
    assert looks.look()[0] >= {5}
    assert looks.look(last=True) == (set(), True)


def test_one_that_ever_had_a_descriptor_is_compared(target: Target, looks: Looks) -> None:
    """Of it only what was written through mappings is named."""
    target.run(f"put(start, 7, {PAGES})")
    assert looks.look() == (set(range(PAGES)), False)
    assert looks.compared
    looks.look()
    target.run("(os.pwrite(fd, b'x', 3 * PAGE), put(start + 4 * PAGE, 8))[1]")
    assert looks.look() == ({4}, False)
    target.run("(os.pwrite(fd, b'y', 5 * PAGE), os.close(fd))[1]")
    assert looks.look() == (set(), True)
    assert looks.compared
    assert looks.look(last=True) == (set(), True)
    assert looks.compared


def test_one_without_a_descriptor_is_compared_once_it_has_one(target: Target, looks: Looks) -> None:
    target.run(f"(put(start, 7, {PAGES}), os.close(fd))[1]")
    looks.look()
    assert looks.look() == (set(), True)
    assert not looks.compared


def test_a_descriptor_that_comes_back_opens_it_again(target: Target, looks: Looks) -> None:
    """By way of /proc, which is how one can come back."""
    target.run(f"(put(start, 7, {PAGES}), os.close(fd))[1]")
    looks.look()
    assert looks.look() == (set(), True)
    span = f"{target.run('start'):x}-{target.run('start') + PAGES * PAGE_BYTES:x}"
    target.run(f"globals().update(again=os.open('/proc/self/map_files/{span}', os.O_RDWR))")
    target.run("os.pwrite(again, b'z', 9 * PAGE)")
    assert looks.look() == (set(range(PAGES)), False)
    assert looks.compared


def test_somebody_outside_keeps_it_open(target: Target, looks: Looks) -> None:
    mine = os.open(f"/proc/{target.pid}/fd/{target.run('fd')}", os.O_RDWR | os.O_CLOEXEC)
    try:
        target.run("(put(start, 7), os.close(fd))[1]")
        assert looks.look()[1] is False
    finally:
        os.close(mine)


def test_where_a_process_cannot_be_looked_at_nothing_is_closed() -> None:
    memfds = Memfds(held=lambda _: None)
    assert memfds.untouched([sys.maxsize]) == frozenset()
    memfds.take([])
    assert memfds.closed == frozenset()
