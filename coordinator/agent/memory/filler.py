"""The filler: a process on the destination that puts the store's pages into the restored tasks, behind the freeze.

CRIU restores tasks without their memory, registers where it is missing with userfaultfd(2), and hands the descriptors
to whom it finds at the socket ``lazy-pages.socket`` (criu/uffd.c: a pid, then its descriptor, for each process; at the
end a number). That is its own daemon or, here, us: the daemon answers with one request and one copy through a socket a
page, and fills in the rest at 50 to 90 MB/s. We have the store mapped, and the kernel copies from it.

A task that touches a missing page waits for us, so faults come first, and bring their neighbours along; behind them
come the pages named hot, then the smallest pieces of memory (a service uses these all over, while a large piece holds
its data), then the rest. Pages that the source still has are asked of the agent.

A process of its own, because a task must not wait for the agent's event loop, and because it does not need the agent:
when all pages are in the store, the agent may end and this goes on. Its own end before it is done is what the guard
(``guard.py``) is there for. Messages to and from the agent are JSON behind a length of four bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import select
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count as numbers
from typing import Any

from coordinator.agent.memory import missing
from coordinator.agent.memory.pieces import Piece, Pieces
from coordinator.agent.memory.store import (
    ABSENT,
    BLOCK_PAGES,
    ON_SOURCE,
    PAGE_BYTES,
    SLOT_BYTES,
    blocks_of,
    contiguous,
)
from coordinator.agent.priority import set_pace

#: A fault brings the aligned group of so many pages along: one costs some 20 µs, copying a page 0.3.
AROUND_PAGES = 32
#: Filled at once in the background: a fault waits for no more than this, some 50 µs.
AT_ONCE_PAGES = 128
#: Asked of the agent at once, and how many of these may be under way.
_FETCH_PAGES, _FETCHES = 256, 4

#: criu/uffd.c, LAZY_PAGES_RESTORE_FINISHED.
_FINISHED = 0x52535446
LENGTH = struct.Struct("=I")
_INT = struct.Struct("=i")


class Content:
    """The store as it is seen from here: its pages by the index."""

    def __init__(self, pages_file: int, index_file: int, directory: dict[int, dict[int, int]], slots: int) -> None:
        """``slots``: how many pages the store may come to have; what lies behind its end is not touched before."""
        self.directory = directory
        blocks = 1 + max((block for each in directory.values() for block in each.values()), default=0)
        self._index = memoryview(mmap.mmap(index_file, blocks * BLOCK_PAGES * SLOT_BYTES)).cast("I")
        self._pages = mmap.mmap(pages_file, max(slots, 1) * PAGE_BYTES)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))

    def pieces(self, pid: int) -> Pieces:
        """Everything that may be held of a process."""
        blocks = sorted(self.directory.get(pid, {}))
        found: list[Piece] = []
        for block in blocks:
            start = block * BLOCK_PAGES
            first = found.pop().start if found and found[-1].end == start else start
            found.append(Piece(first, start + BLOCK_PAGES, first))
        return Pieces(found)

    def runs(self, pid: int, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """How consecutive pages are held: (first page, its slot, or what else the index says, length)."""
        known = self.directory.get(pid, {})
        slots: list[int] = []
        for number, begin, end in blocks_of(first, count):
            at = known.get(number, 0) * BLOCK_PAGES
            slots += self._index[at + begin : at + end] if number in known else [ABSENT] * (end - begin)
        for position, slot, length in contiguous(slots):
            yield first + position, slot, length

    def address(self, slot: int) -> int:
        """Where the page of a slot is mapped here."""
        return self._address + slot * PAGE_BYTES


class Space:
    """One address space that is being filled."""

    def __init__(self, descriptor: int, pid: int, pieces: Pieces) -> None:
        self.descriptor = descriptor
        self.pid = pid
        self.pieces = pieces
        self.faults: deque[int] = deque()
        self.polled = False
        #: What to fill in the background, in this order: the hot pages; all others, the smallest piece first.
        self.hot: deque[tuple[int, int]] = deque()
        smallest_first = sorted(pieces, key=lambda each: each.end - each.start)
        self.queue: deque[tuple[int, int]] = deque((each.start, each.end) for each in smallest_first)

    def forked(self, descriptor: int) -> Space:
        """A child with the same pages missing."""
        return Space(descriptor, self.pid, self.pieces.copy())


class Gone(Exception):
    """The address space has ended."""


class Filler:
    """Spaces and what is asked for them. ``ask`` wants pages (pid, first page, count) that the source still has."""

    def __init__(self, content: Content, ask: Callable[[int, int, int], None]) -> None:
        self._content = content
        self._ask = ask
        self._asked: set[tuple[int, int, int]] = set()
        self.spaces: dict[int, Space] = {}
        #: Whether every mapping is registered. Until the restore has come that far, only what is asked for is filled
        #: in: its neighbours may have a place that they are still to be moved to.
        self.settled = False

    def add(self, descriptor: int, pid: int, hot: list[tuple[int, int]]) -> None:
        """Fill the memory behind a descriptor with that of a process; ``hot``: (page, count), to be filled first."""
        space = Space(descriptor, pid, self._content.pieces(pid))
        space.hot.extend((first, first + count) for first, count in hot)
        self.spaces[descriptor] = space

    def attend(self, space: Space) -> None:
        """Take in what has happened in a space, and answer the faults among it."""
        with self._closing(space):
            self._attend(space)

    def _attend(self, space: Space) -> None:
        for event in missing.read_events(space.descriptor):
            if isinstance(event, missing.Fault):
                space.faults.append(event.page)
            elif isinstance(event, missing.Fork):
                self.spaces[event.descriptor] = space.forked(event.descriptor)
            elif isinstance(event, missing.Remap):
                space.pieces.move(event.start, event.to, event.count)
                space.queue.append((event.to, event.to + event.count))
            else:
                space.pieces.cut(event.start, event.end)
        for _ in range(len(space.faults)):
            self._answer(space, space.faults.popleft())

    def background(self, space: Space, queue: deque[tuple[int, int]]) -> None:
        """Fill in a little of what nobody has touched yet, the first of one of the space's queues. What is hot is
        here; what stands beside it and is not, is fetched in its turn."""
        start, end = queue.popleft()
        if end - start > AT_ONCE_PAGES:
            queue.appendleft((start + AT_ONCE_PAGES, end))
            end = start + AT_ONCE_PAGES
        with self._closing(space):
            for piece in space.pieces.within(start, end):
                self._fill(space, piece, urgent=False, fetch=queue is not space.hot)

    def here(self, pid: int, first: int, count: int) -> None:
        """Pages that were asked for have come: fill them in wherever they are missing."""
        self._asked.discard((pid, first, count))
        for space in [space for space in self.spaces.values() if space.pid == pid]:
            with self._closing(space):
                for piece in space.pieces:
                    begin, end = max(piece.source, first), min(piece.source + piece.end - piece.start, first + count)
                    if end > begin:
                        at = piece.start + begin - piece.source
                        self._fill(space, Piece(at, at + end - begin, begin), urgent=True)

    @property
    def may_ask(self) -> bool:
        """Whether the background may ask for more."""
        return len(self._asked) < _FETCHES

    def close(self, space: Space) -> None:
        """Everything is in it, or it has ended. Closing the descriptor ends its registration (userfaultfd_release)."""
        os.close(space.descriptor)
        del self.spaces[space.descriptor]

    @contextlib.contextmanager
    def _closing(self, space: Space) -> Iterator[None]:
        """A space that turns out to have ended is closed."""
        try:
            yield
        except Gone:
            self.close(space)

    def _answer(self, space: Space, page: int) -> None:
        """Fill the page that a task waits for, and its neighbours; where nothing is held it is zero."""
        group = page - page % AROUND_PAGES
        wanted = space.pieces.within(page, page + 1)
        if wanted:
            self._fill(space, wanted[0], urgent=True)
            for piece in space.pieces.within(group, group + AROUND_PAGES) if self.settled else ():
                self._fill(space, piece, urgent=False)
        if not wanted or not space.pieces.within(page, page + 1):
            self._wake_with_zero(space, page)

    def _wake_with_zero(self, space: Space, page: int) -> None:
        """Zero the page if it is missing still; wake who waits in any case."""
        problem = missing.zero(space.descriptor, page, 1)[1]
        if problem == errno.EAGAIN:
            space.faults.append(page)
        elif problem in (errno.ESRCH, errno.ENOSPC):
            raise Gone
        elif problem:
            missing.wake(space.descriptor, page)

    def _fill(self, space: Space, piece: Piece, *, urgent: bool, fetch: bool = True) -> None:
        for first, slot, length in self._content.runs(space.pid, piece.source, piece.end - piece.start):
            start = piece.start + first - piece.source
            if slot == ABSENT:
                space.pieces.cut(start, start + length)
            elif slot == ON_SOURCE:
                if fetch:
                    self._want(space, start, first, length, urgent=urgent)
            elif not self._copy(space, start, slot, length):
                space.queue.appendleft((piece.start, piece.end))  # when its events are read
                if urgent:
                    space.faults.append(piece.start)
                return

    def _want(self, space: Space, start: int, first: int, length: int, *, urgent: bool) -> None:
        """Ask for pages; a fault asks in any case, the background as long as not too much is under way."""
        for begin in range(0, length, _FETCH_PAGES):
            wanted = (space.pid, first + begin, min(_FETCH_PAGES, length - begin))
            if self._is_asked(*wanted):
                continue
            if not urgent and not self.may_ask:
                space.queue.append((start + begin, start + length))
                return
            self._asked.add(wanted)
            self._ask(*wanted)

    def _is_asked(self, pid: int, first: int, count: int) -> bool:
        return any(pid == of and at <= first and first + count <= at + length for of, at, length in self._asked)

    def _copy(self, space: Space, start: int, slot: int, count: int) -> bool:
        """Copy pages from consecutive slots; ``False`` if events are to be read first.

        A mapping can go away while the kernel copies: it looks for unread events only before (fs/userfaultfd.c,
        userfaultfd_copy), and then finds no mapping, which is not yet the last word. Asked again it speaks of the
        event, as nobody but us reads it. Only a page without a place and without an event has none."""
        at_once, asked_again = count, False
        while count:
            done, problem = missing.copy(space.descriptor, start, self._content.address(slot), min(at_once, count))
            if not problem:
                done = min(at_once, count)
            elif problem == errno.EAGAIN and not done:
                return False
            elif problem in (errno.ESRCH, errno.ENOSPC):
                raise Gone
            elif problem == errno.EEXIST and not done:
                missing.wake(space.descriptor, start)
                done = 1
            elif problem == errno.ENOENT and not done and at_once > 1:
                at_once = max(1, min(at_once, count) // 2)  # it reaches beyond a mapping
                continue
            elif problem == errno.ENOENT and not done and not asked_again:
                asked_again = True
                continue
            elif problem == errno.ENOENT and not done:  # nothing is registered there
                print(f"page {start:#x} of process {space.pid} has no place", flush=True)  # noqa: T201 - its log
                missing.wake(space.descriptor, start)
                done = 1
            elif not done:
                raise OSError(problem, f"filling page {start:#x} of process {space.pid}: {os.strerror(problem)}")
            space.pieces.cut(start, start + done)
            start, slot, count, asked_again = start + done, slot + done, count - done, False
        return True


class Conversation:
    """The filler's process: its sockets, and when it is done."""

    def __init__(self, agent: socket.socket, listener: socket.socket, pages_file: int, index_file: int) -> None:
        self._agent = agent
        self._listener = listener
        self._files = (pages_file, index_file)
        self._restore: socket.socket | None = None
        self._filler: Filler | None = None
        self._hot: dict[int, list[tuple[int, int]]] = {}
        self._poll = select.epoll()
        self._finished = self._alone = False
        self._turn = numbers()

    def run(self) -> int:
        """Until every space is filled or gone, and CRIU's restore has said that it is finished: 0. 1 if the restore
        or, while pages are still on the source, the agent ends before."""
        for each in (self._agent, self._listener):
            self._poll.register(each, select.EPOLLIN)
        while not (self._finished and self._filler is not None and self._filler.settled and not self._filler.spaces):
            for descriptor, _ in self._poll.poll(
                0 if self._filler is not None and self._fill_some(self._filler) else None
            ):
                if not self._handle(descriptor):
                    return 1
        return 0

    def _handle(self, descriptor: int) -> bool:
        if descriptor == self._agent.fileno():
            return self._hear()
        if descriptor == self._listener.fileno():
            self._restore, _ = self._listener.accept()
            self._poll.register(self._restore, select.EPOLLIN)
            return True
        if self._restore is not None and descriptor == self._restore.fileno():
            return self._receive_space(self._restore)
        if self._filler is not None and (space := self._filler.spaces.get(descriptor)) is not None:
            self._filler.attend(space)
        return True

    def _fill_some(self, filler: Filler) -> bool:
        """Do a little of what can be done without being told, and say whether there was any."""
        for space in tuple(filler.spaces.values()):
            if not space.polled:
                space.polled = True
                self._poll.register(space.descriptor, select.EPOLLIN)
            if space.faults:
                filler.attend(space)
        if not filler.settled:
            return any(space.faults for space in filler.spaces.values())
        if complete := [space for space in filler.spaces.values() if not space.pieces]:
            for space in complete:
                filler.close(space)
            return True
        queues = [(space, space.hot) for space in filler.spaces.values() if space.hot]
        if not queues and self._finished:  # before, the restore needs the processors more
            queues = [(space, space.queue) for space in filler.spaces.values() if space.queue]
        if queues and (self._alone or filler.may_ask):
            filler.background(*queues[next(self._turn) % len(queues)])
            return True
        return any(space.faults for space in filler.spaces.values())

    def _hear(self) -> bool:
        """A message of the agent's. Its end matters before it has seen the tasks, or while pages are on the source."""
        message = self._read()
        if message is None:
            self._poll.unregister(self._agent)
            return self._alone and self._filler is not None and self._filler.settled
        if "directory" in message:
            directory = {int(pid): dict(blocks) for pid, blocks in message["directory"]}
            self._hot = {int(pid): [tuple(run) for run in runs] for pid, runs in message["hot"]}
            self._alone = message["complete"]
            self._filler = Filler(Content(*self._files, directory, message["slots"]), self._want)
        elif self._filler is not None and "begin" in message:
            self._filler.settled = True
            set_pace("serving")  # in the freeze it was urgent; from here on the tasks are
        elif self._filler is not None:
            self._filler.here(*message["here"])
        return True

    def _read(self) -> dict[str, Any] | None:
        try:
            head = self._agent.recv(LENGTH.size, socket.MSG_WAITALL)
            if len(head) < LENGTH.size:
                return None
            (length,) = LENGTH.unpack(head)
            message: dict[str, Any] = json.loads(self._agent.recv(length, socket.MSG_WAITALL))
        except OSError:
            return None
        return message

    def _want(self, pid: int, first: int, count: int) -> None:
        data = json.dumps({"want": [pid, first, count]}).encode()
        self._agent.sendall(LENGTH.pack(len(data)) + data)

    def _receive_space(self, restore: socket.socket) -> bool:
        """The next thing that CRIU's restore says: a process, or that it is finished."""
        data = restore.recv(_INT.size, socket.MSG_WAITALL)
        if len(data) < _INT.size:
            self._poll.unregister(restore)
            return self._finished
        (pid,) = _INT.unpack(data)
        if pid == _FINISHED:
            self._finished = True
        elif pid >= 0:  # below: a zombie, which has no memory
            _, descriptors, _, _ = socket.recv_fds(restore, 64, 1)
            assert self._filler is not None
            self._filler.add(descriptors[0], pid, self._hot.get(pid, []))
        return True


def main() -> int:
    """The process: descriptors of the agent's socket, the listening socket, and the store's two files."""
    agent, listener, pages_file, index_file = map(int, sys.argv[1:])
    with socket.socket(fileno=agent) as to_agent, socket.socket(fileno=listener) as listening:
        return Conversation(to_agent, listening, pages_file, index_file).run()
