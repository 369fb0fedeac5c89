"""The pattern service with memory of every kind: private, shared, of files, forked, growing and shrinking.

Says the same to its clients as `pattern_server.py`; only what it carries along is different. Runs as
`python3 -m labs.programs.memory_server`: the process that listens, two workers that share memory with it and have
copies of the rest, and, for a tenth of a second each, children that come and go.
"""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import time
from contextlib import suppress

from labs.programs import pattern_server
from labs.programs.ballast import PAGE_BYTES
from labs.programs.memory_regions import Changing, MemoryFile, Region, Serials, note, of_file, private, shared

WORKERS = 2
WORKER_TURN_S = 0.01
VERIFY_TIMEOUT_S = 60.0
MAYFLY_PAGES, MAYFLY_S = 8, 0.1
LOST_WORKER = 1 << 32
PAUSE, CHECK, GO_ON = b"p", b"c", b"g"
_COUNT = struct.Struct("=Q")


class Memory:
    """What one process of the service has; after a fork each side goes on with its own."""

    def __init__(self, pages: int) -> None:
        self.common = [shared(1, pages // 8), MemoryFile(2, pages // 8)]
        self.own = [private(3, pages // 4), private(4, pages // 8), of_file(5, pages // 8)]
        self.changing = Changing(6, pages // 8)
        self._serials = Serials()
        self._random = random.Random(0)
        for region in self.own[:2]:
            for page in region.mine:
                region.write(page, self._serials)
        self.becomes(0)

    @property
    def pages(self) -> int:
        return sum(region.pages for region in self._all())

    @property
    def wrong(self) -> int:
        return sum(region.wrong for region in self._all())

    def becomes(self, process: int) -> None:
        """This process is that one: of the common pages it writes its share."""
        for region in self.common:
            region.mine = range(process, region.pages, WORKERS + 1)
        self._serials = Serials(process)
        self._random = random.Random(process)

    def dirty(self, pages: int) -> None:
        """Rewrite so many pages, here and there, and change one mapping."""
        regions: list[Region] = [*self.common, *self.own]
        for _ in range(pages):
            region = self._random.choice(regions)
            region.write(self.choose(region), self._serials)
            self.changing.write(self._serials)
        self.changing.change(self._serials)

    def choose(self, region: Region) -> int:
        """A page that this process may write."""
        return self._random.choice(region.mine)

    def check_all(self) -> None:
        for region in self._all():
            region.check_all()

    def _all(self) -> list[Region | Changing]:
        return [*self.common, *self.own, self.changing]


class Family:
    """The memory of all processes, for `PatternServer` to carry. The workers start with the first write."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._workers: list[socket.socket] = []
        self._mayfly = 0
        self._wrong = 0

    @property
    def pages(self) -> int:
        return self._memory.pages

    def dirty(self, pages: int) -> None:
        """Write, and have a child or lose one."""
        if not self._workers:
            self._workers = [self._start_worker(number, pages) for number in range(1, WORKERS + 1)]
        self._memory.dirty(pages)
        self._bear()

    def check_all(self) -> int:
        """Look at every page of every process; return how many were ever found to be wrong."""
        self._tell_workers(PAUSE)
        found = [self._answer(worker) for worker in self._workers]
        self._tell_workers(CHECK)  # now that nobody writes
        self._memory.check_all()
        found = [max(before, self._answer(worker)) for before, worker in zip(found, self._workers, strict=True)]
        self._tell_workers(GO_ON)
        return self._wrong + self._memory.wrong + sum(found)

    def _tell_workers(self, what: bytes) -> None:
        for worker in self._workers:
            with suppress(OSError):
                worker.sendall(what)

    @staticmethod
    def _answer(worker: socket.socket) -> int:
        worker.settimeout(VERIFY_TIMEOUT_S)
        try:
            answer = worker.recv(_COUNT.size)
        except OSError:
            return LOST_WORKER
        return int(_COUNT.unpack(answer)[0]) if answer else LOST_WORKER

    def _start_worker(self, number: int, pages: int) -> socket.socket:
        ours, theirs = socket.socketpair()
        if os.fork():
            theirs.close()
            return ours
        self._close_all_but(theirs.fileno())
        self._memory.becomes(number)
        work(self._memory, theirs, pages)
        os._exit(0)

    def _bear(self) -> None:
        """A child that looks at its copy of everything and ends, again and again."""
        last = self._mayfly
        if last:
            pid, status = os.waitpid(last, os.WNOHANG)
            if not pid:
                return
            if status:
                self._wrong += 1
                note(f"a child ended with {os.waitstatus_to_exitcode(status)}")
        self._mayfly = os.fork()
        if not self._mayfly:
            self._close_all_but()
            os._exit(live_briefly(self._memory))

    def _close_all_but(self, *kept: int) -> None:
        """A client's connection must not be held open by a child."""
        wanted = {0, 1, 2, *kept, *(each.descriptor for each in self._memory.common if isinstance(each, MemoryFile))}
        for descriptor in [int(name) for name in os.listdir("/proc/self/fd")]:  # noqa: PTH208 - closed before use
            if descriptor not in wanted:
                with suppress(OSError):
                    os.close(descriptor)


def live_briefly(memory: Memory) -> int:
    """What a child does: looks at its copy, writes, waits, looks again."""
    before = memory.wrong
    for region in memory.own:
        region.check_all()
    serials = Serials(WORKERS + 1)
    sample = [(region, memory.choose(region)) for region in memory.own for _ in range(MAYFLY_PAGES)]
    for region, page in sample:
        region.write(page, serials)
    time.sleep(MAYFLY_S)
    for region, page in sample:
        region.check(page)
    return int(memory.wrong != before)


def work(memory: Memory, sock: socket.socket, pages: int) -> None:
    """Write until the other end is closed; when told so, pause, look at everything, and go on."""
    paused = False
    while True:
        if paused or select.select([sock], [], [], WORKER_TURN_S)[0]:
            told = sock.recv(1)
            if not told:
                return
            if told == CHECK:
                memory.check_all()
            paused = told != GO_ON
            if paused:
                sock.sendall(_COUNT.pack(memory.wrong))
        if not paused:
            memory.dirty(pages)


def main() -> None:
    options = pattern_server.arguments().parse_args()
    pages = options.memory_mb * pattern_server.MEGABYTE // PAGE_BYTES
    pattern_server.serve(options, lambda: Family(Memory(pages)))


if __name__ == "__main__":
    main()
