"""System V segments over real processes: what is not named as changed is not, whoever comes and goes."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from coordinator.agent import tasks
from coordinator.agent.memory.base import PAGE_BYTES, PageRun
from coordinator.agent.memory.holes import holes_are_told
from coordinator.agent.memory.pages import read_pages
from coordinator.agent.memory.segments import segments_of
from coordinator.agent.memory.tree import TreeTracker
from coordinator.agent.memory.write_protect import WriteProtectTracker
from tests.contract.memory_target import CHOICE, Target, memory_of, state, until, within

pytestmark = pytest.mark.skipif(CHOICE.name != "write_protect", reason=CHOICE.reason)

BYTES = 1 << 20
#: Those at the beginning, which are written to.
PAGES = 16
PROGRAM = f"""
import random
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes, libc.shmdt.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int), (ctypes.c_void_p,)
def attach(options=0):
    return libc.shmat(segment, None, options)
def visit(page):
    at = attach()
    ctypes.string_at(at + page * PAGE, 1)  # it comes in writable, so that the object's times do not tell of the write
    put(at + page * PAGE, 9)
    libc.shmdt(at)
def write(addresses):
    while True:
        put(random.choice(addresses) + random.randrange({PAGES}) * PAGE, random.randrange(256))
        time.sleep(0.0002)
"""
NEWIPC, RDONLY, DONTFORK = 0x08000000, 0o10000, 10


@dataclass
class Service:
    """A process in an IPC namespace of its own, with a segment that it has attached, all of it written to."""

    target: Target
    segment: int
    start: int
    tree: TreeTracker

    def look(self, *, last: bool = False) -> tuple[set[int], bool]:
        """The pages of the segment that are named, by number, and whether nobody unknown can have written others."""
        answer = self.tree.collect(last=last)[self.target.pid]
        found = within(answer.changes.dirty, self.start, PAGES)
        return {(address - self.start) // PAGE_BYTES for address in found}, self.segment in answer.closed.segments

    def stranger(self) -> Target:
        """A process of the same namespace that nobody tracks."""
        made = Target()
        made.run(f"exec({PROGRAM!r}, globals())")
        made.run(f"segment = {self.segment}")
        assert made.run(f"libc.setns(os.open('/proc/{self.target.pid}/ns/ipc', 0), {NEWIPC})") == 0
        return made


@dataclass
class Attached:
    """A process with its segment, which nobody has looked at."""

    target: Target
    segment: int
    start: int

    @classmethod
    def made(cls, target: Target) -> Attached:
        """Have a process attach a segment, and write to it."""
        target.run(f"exec({PROGRAM!r}, globals())")
        assert target.run(f"libc.unshare({NEWIPC})") == 0
        segment = target.run(f"(segment := libc.shmget(0, {BYTES}, 0o600))")
        start = target.run("(a := attach())")
        target.run(f"put(a, 1, {PAGES}); libc.madvise(a, {BYTES}, {DONTFORK})")
        return cls(target, segment, start)


@pytest.fixture(scope="module")
def waiting(request: pytest.FixtureRequest) -> Iterator[list[Attached]]:
    """One for each test of this module that wants one: nothing is known of a segment for seconds after it was attached,
    and so they wait for that together."""
    wanted = [each for each in request.session.items if each.path == request.path and takes_a_service(each)]
    with contextlib.ExitStack() as ends:
        yield [Attached.made(ends.enter_context(Target())) for _ in wanted]


def takes_a_service(test: pytest.Item) -> bool:
    return isinstance(test, pytest.Function) and "service" in test.fixturenames


@pytest.fixture
def service(waiting: list[Attached]) -> Iterator[Service]:
    """It has been looked at until all is known."""
    attached = waiting.pop()
    target = attached.target
    with contextlib.closing(TreeTracker(target.pid, WriteProtectTracker, segments_of(target.pid))) as tree:
        made = Service(target, attached.segment, attached.start, tree)
        until(lambda: made.look()[1])
        until(lambda: made.look() == (set(), True))
        yield made


def test_what_is_written_is_told_page_for_page(service: Service) -> None:
    service.target.run("put(a + 5 * PAGE, 2)")
    assert service.look() == ({5}, True)
    assert service.look() == (set(), True)


def test_children_without_it_say_nothing_of_it(service: Service) -> None:
    service.target.fork("os._exit(0)")
    service.target.run(f"os.waitpid({service.target.children.pop()}, 0)[0]")
    service.target.run("put(a + 5 * PAGE, 2)")
    assert service.look(last=True) == ({5}, True)


VISITORS = {
    "itself": "visit(5)",
    "a child": "(pid := os.fork()) and os.waitpid(pid, 0)[0] or visit(5) or os._exit(0)",
}


@pytest.mark.parametrize("visitor", [*VISITORS, "a stranger"])
@pytest.mark.parametrize("last", [False, True])
def test_of_a_visit_between_two_looks_everything_is_doubted(service: Service, visitor: str, last: bool) -> None:
    if visitor in VISITORS:
        service.target.run(VISITORS[visitor])
    else:
        with service.stranger() as other:
            other.run("visit(5)")
    found, trusted = service.look(last=last)
    assert 5 in found
    assert not trusted


@pytest.mark.parametrize("last", [False, True])
def test_a_hole_that_is_read_makes_everything_dirty(service: Service, last: bool) -> None:
    """The page that comes in has the mark of the one that went."""
    service.target.run("libc.madvise(a + 5 * PAGE, PAGE, 9); ctypes.string_at(a + 5 * PAGE, 1)")
    found, trusted = service.look(last=last)
    assert 5 in found
    assert trusted != last
    if not last:
        assert service.look() == (set(), True)


def test_this_kernel_tells_of_holes_in_segments_and_nothing_is_left(service: Service) -> None:
    before = Path("/proc/sysvipc/shm").read_text(), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    assert holes_are_told()
    assert (Path("/proc/sysvipc/shm").read_text(), len(os.listdir("/proc/self/fd"))) == before  # noqa: PTH208


def test_as_long_as_a_stranger_has_it_nothing_is_known(service: Service) -> None:
    with service.stranger() as other:
        other.run("(b := attach())")
        for page in range(4):
            other.run(f"ctypes.string_at(b + {page} * PAGE, 1); put(b + {page} * PAGE, 9)")
            found, trusted = service.look()
            assert page in found
            assert not trusted


def test_what_can_only_read_says_nothing(service: Service) -> None:
    there = service.target.run(f"(b := attach({RDONLY}))")
    service.target.run(f"ctypes.string_at(b, {PAGES} * PAGE)[0]")
    until(lambda: service.look()[1])
    until(lambda: service.look() == (set(), True))
    service.target.run("put(a + 5 * PAGE, 2)")
    answer = service.tree.collect(last=True)[service.target.pid]
    assert not within(answer.changes.dirty, there, PAGES)
    assert len(within(answer.changes.dirty, service.start, PAGES)) == 1


def test_two_namespaces_are_two_tables(service: Service) -> None:
    """That of another process has a segment of the same number."""
    with Target() as other:
        other.run(f"exec({PROGRAM!r}, globals())")
        assert other.run(f"libc.unshare({NEWIPC})") == 0
        assert other.run(f"(segment := libc.shmget(0, {BYTES}, 0o600))") == service.segment
        other.run("visit(5)")
    assert service.look(last=True) == (set(), True)


def test_we_stay_in_our_own_namespace(service: Service) -> None:
    here = os.readlink("/proc/thread-self/ns/ipc")  # noqa: PTH115
    segments_of(service.target.pid).close()
    assert os.readlink("/proc/thread-self/ns/ipc") == here  # noqa: PTH115
    assert not segments_of(1 << 30).closed


def test_not_one_byte_differs_after_rounds_under_writes(service: Service) -> None:
    """Two processes write through two attachments each; both are stopped in the end."""
    service.target.run(f"b = attach(); libc.madvise(b, {BYTES}, {DONTFORK})")
    child = service.target.fork("write([attach(), attach()])")
    until(lambda: Path(f"/proc/{child}/maps").read_text().count("/SYSV") == 2)
    service.target.run("threading.Thread(target=write, args=([a, b],), daemon=True).start()")
    until(lambda: service.look()[1])
    content: dict[int, bytes] = {}
    for _ in range(60):
        take(service, content)
    for pid in (service.target.pid, child):
        os.kill(pid, signal.SIGSTOP)
        until(lambda pid=pid: all(state(thread) == "T" for thread in tasks.threads(pid)))  # type: ignore[misc]
    take(service, content, last=True)
    assert content
    for page, kept in content.items():
        assert kept == memory_of(service.target.pid, service.start + page * PAGE_BYTES, PAGE_BYTES)


def take(service: Service, content: dict[int, bytes], *, last: bool = False) -> None:
    """Keep what is named of the segment."""
    for pid, answer in service.tree.collect(last=last).items():
        assert answer.closed.segments == {service.segment}
        for mapping in (each for each in answer.changes.mappings if each.segment is not None):
            for address in within(answer.changes.dirty, mapping.start, PAGES):
                (batch,) = read_pages(pid, [PageRun(address, 1)])
                content[(address - mapping.start) // PAGE_BYTES] = bytes(batch.data)
