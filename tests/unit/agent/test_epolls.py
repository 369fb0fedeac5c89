"""When CRIU need not ask about the entries of epolls: decided over what is open, and seen in this very process."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from coordinator.agent import epolls
from coordinator.agent.epolls import MOST_ASKED, Entry, Epolls, as_numbered, is_entry, opened, pays

SOCKETS = {3: 30, 4: 40}


def of_socket(number: int, inode: int) -> Entry:
    """An entry with a device as sockets have it."""
    with select.epoll() as epoll, socket.socket() as real:
        epoll.register(real, select.EPOLLIN)
        ((_, _, device),) = opened(os.getpid()).epolls[epoll.fileno()]
    return number, inode, device


THREE, FOUR = of_socket(3, 30), of_socket(4, 40)


def never(number: int) -> bool:
    raise AssertionError(f"the kernel was asked of {number}")


def test_sockets_with_the_same_inode_are_not_asked_about() -> None:
    assert as_numbered([THREE, FOUR], SOCKETS, never)
    assert as_numbered([], SOCKETS, never)


@pytest.mark.parametrize("entry", [of_socket(4, 30), (*FOUR[:2], FOUR[2] + 1), of_socket(5, 40)])
@pytest.mark.parametrize("same", [False, True])
def test_of_all_else_the_kernel_is_asked(entry: Entry, same: bool) -> None:
    asked = []

    def ask(number: int) -> bool:
        asked.append(number)
        return same

    assert as_numbered([THREE, entry], SOCKETS, ask) is same
    assert asked == [entry[0]]


def test_two_entries_of_one_number_cannot_both_be_what_has_it_now() -> None:
    assert not as_numbered([THREE, of_socket(3, 31)], SOCKETS, lambda _: True)
    assert not as_numbered([THREE, THREE], SOCKETS, lambda _: True)


def test_of_many_that_are_no_sockets_criu_asks_itself() -> None:
    others = [(100 + n, 7, 14) for n in range(MOST_ASKED + 1)]
    assert as_numbered(others[1:], SOCKETS, lambda _: True)
    assert not as_numbered(others, SOCKETS, never)


@pytest.mark.parametrize(("entries", "worth"), [([], False), ([600] * 8, False), ([1500], False), ([2000], True)])
def test_it_pays_for_large_epolls(entries: list[int], worth: bool) -> None:
    assert pays(entries) is worth


class Watching:
    """An epoll of this process that watches a socket, a pipe and an eventfd."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.ours, self.theirs = socket.socketpair()
        self.reader, self.writer = os.pipe()
        self.event = os.eventfd(0)
        self.numbers = (self.ours.fileno(), self.reader, self.event)
        for number in self.numbers:
            self.epoll.register(number, select.EPOLLIN)

    def close(self) -> None:
        for end in (self.epoll, self.ours, self.theirs):
            end.close()
        for number in (self.reader, self.writer, self.event):
            os.close(number)

    def entries(self) -> dict[int, Entry]:
        return {entry[0]: entry for entry in opened(os.getpid()).epolls[self.epoll.fileno()]}

    def as_numbered(self) -> bool:
        there, epoll = opened(os.getpid()), self.epoll.fileno()
        return as_numbered(there.epolls[epoll], there.sockets, lambda number: is_entry(os.getpid(), epoll, number))


@pytest.fixture
def watching() -> Iterator[Watching]:
    with closing(Watching()) as made:
        yield made


def test_what_is_open_is_read_from_the_kernel(watching: Watching) -> None:
    entries = watching.entries()
    assert set(entries) == set(watching.numbers)
    entry = entries[watching.ours.fileno()]
    assert entry[1] == opened(os.getpid()).sockets[watching.ours.fileno()]
    assert entry[1] == os.fstat(watching.ours.fileno()).st_ino
    assert watching.reader not in opened(os.getpid()).sockets
    assert watching.as_numbered()


def test_thousands_of_entries_are_all_read() -> None:
    pairs = [socket.socketpair() for _ in range(1500)]
    with select.epoll() as epoll:
        for pair in pairs:
            for end in pair:
                epoll.register(end, select.EPOLLIN)
        there = opened(os.getpid())
        assert len(there.epolls[epoll.fileno()]) == 3000
        assert as_numbered(there.epolls[epoll.fileno()], there.sockets, never)
    for pair in pairs:
        for end in pair:
            end.close()


def test_a_number_that_is_another_sockets_by_now_is_found(watching: Watching) -> None:
    """Closed, but a copy of it lives: it stays in the epoll, and its number is given away."""
    number = watching.ours.fileno()
    copy = os.dup(number)
    os.dup2(watching.theirs.fileno(), number)
    try:
        assert not watching.as_numbered()
    finally:
        os.close(copy)


def test_a_number_that_is_another_pipes_end_by_now_is_found(watching: Watching) -> None:
    """Both ends of a pipe have one inode."""
    copy = os.dup(watching.reader)
    os.dup2(watching.writer, watching.reader)
    try:
        assert not watching.as_numbered()
    finally:
        os.close(copy)


def test_what_was_seen_while_all_stood_still_is_the_answer(watching: Watching) -> None:
    looked = Epolls(os.getpid())
    looked.look()
    copy = os.dup(watching.event)
    os.close(watching.event)
    try:
        assert looked.as_numbered()
        assert not Epolls(os.getpid()).as_numbered()
    finally:
        os.dup2(copy, watching.event)
        os.close(copy)


def test_a_look_that_failed_is_made_again(watching: Watching, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(pid: int) -> list[int]:
        raise OSError(24, "Too many open files")

    looking = Epolls(os.getpid())
    with monkeypatch.context() as patched:
        patched.setattr(epolls, "process_tree", failing)
        with pytest.raises(OSError, match="Too many"):
            looking.look()
    assert looking.as_numbered()


def test_a_number_that_is_closed_is_found(watching: Watching) -> None:
    copy = os.dup(watching.event)
    os.close(watching.event)
    try:
        assert not watching.as_numbered()
    finally:
        os.dup2(copy, watching.event)
        os.close(copy)


def test_a_process_that_is_gone_has_nothing_open() -> None:
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    assert not opened(child).epolls
    assert not opened(child).sockets
