"""The workload of the world: two processes whose memory changes in every way that copying has to notice.

Pages are named by the pid in CRIU's images and their address. ``work`` is a moment of a service that runs: the same in
every run, so that a page that was missed is missed every time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

from coordinator.agent.memory.base import PAGE_BYTES, Backing, Mapping, PageRun

#: (pid in CRIU's images, address).
Page = tuple[int, int]

ROOT, CHILD = 1, 2
#: Private anonymous memory, which CRIU leaves to its daemon, and shared memory, which is always in its images.
PRIVATE, SHARED = 0x10000, 0x90000
_PRIVATE_PAGES = 8
_ZEROES = bytes(PAGE_BYTES)


def content(value: int) -> bytes:
    """A page full of a number."""
    return value.to_bytes(4, "little") * (PAGE_BYTES // 4)


def private(number: int) -> int:
    """Address of a private page."""
    return PRIVATE + number * PAGE_BYTES


def is_lazy(page: Page) -> bool:
    """Whether CRIU leaves the page to its daemon."""
    return page[1] < SHARED


def mappings() -> tuple[Mapping, ...]:
    """What every process of the workload has mapped."""
    end = private(_PRIVATE_PAGES)
    memfd = Mapping(SHARED, SHARED + PAGE_BYTES, "rw-s", Backing.SHMEM, 0, "00:01", 9, "/memfd:shared")
    return Mapping(PRIVATE, end, "rw-p", Backing.ANONYMOUS, 0, "00:00", 0, ""), memfd


def runs(addresses: set[int]) -> tuple[PageRun, ...]:
    """Sorted runs of pages; none crosses the end of a mapping."""
    numbered = enumerate(sorted(addresses))
    grouped = [[address for _, address in run] for _, run in groupby(numbered, lambda at: at[1] - at[0] * PAGE_BYTES)]
    return tuple(PageRun(run[0], len(run)) for run in grouped)


@dataclass
class Workload:
    """``memory`` is what the processes have; a page of zeroes is there and holds nothing."""

    memory: dict[Page, bytes] = field(default_factory=dict)
    moments: int = 0

    def __post_init__(self) -> None:
        """At the beginning: two processes."""
        for number in range(6):
            self.memory[ROOT, private(number)] = content(number + 1)
        self.memory[ROOT, private(6)] = _ZEROES
        self.memory[ROOT, SHARED] = content(99)
        self._fork(50)

    def work(self) -> None:
        """A moment passes: pages are written, discarded, made zero; the child ends, and another one is forked."""
        self.moments += 1
        now = self.moments
        self.memory[ROOT, private(now % 3)] = content(1000 + now)
        if now % 2 == 0:
            self.memory[ROOT, SHARED] = content(2000 + now)
        match now % 7:
            case 1:
                self.memory[ROOT, private(7)] = content(3000 + now)
            case 2:
                self.memory.pop((ROOT, private(4)), None)
            case 3:
                self._end_child()
            case 4:
                self.memory[ROOT, private(5)] = _ZEROES
            case 5:
                self._fork(4000 + now)
            case 6:
                self.memory[ROOT, private(4)] = content(5000 + now)

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes that there are."""
        return tuple(sorted({pid for pid, _ in self.memory}))

    def _fork(self, value: int) -> None:
        self.memory[CHILD, private(0)] = content(value)
        self.memory[CHILD, private(2)] = content(value + 1)

    def _end_child(self) -> None:
        for page in [page for page in self.memory if page[0] == CHILD]:
            del self.memory[page]
