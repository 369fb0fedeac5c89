"""Registering the memory of a process that runs on, and changes its mappings meanwhile."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.agent.memory import userfault
from coordinator.agent.memory.base import Tracker
from coordinator.agent.memory.choose import why_not_write_protect
from tests.contract.memory_target import Target, pages, within

REFUSAL = why_not_write_protect()
pytestmark = pytest.mark.skipif(REFUSAL is not None, reason=REFUSAL or "")

FAILED = (1 << 64) - 1


@pytest.fixture
def before_registering(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Does something once, between reading the mappings and registering them."""

    def arrange(change: Callable[[], object]) -> None:
        def change_and_ask(descriptor: int, number: int, argument: Any) -> Any:
            if number == userfault.UFFDIO_REGISTER:
                monkeypatch.undo()
                change()
            return fcntl.ioctl(descriptor, number, argument)

        monkeypatch.setattr(userfault, "fcntl", SimpleNamespace(ioctl=change_and_ask))

    return arrange


def test_what_grows_meanwhile_stays_one_mapping(
    target: Target, tracker: Tracker, before_registering: Callable[[Callable[[], object]], None]
) -> None:
    """mremap(2) refuses to resize what the kernel has split."""
    target.run("a = area(64); libc.munmap(a + 4 * PAGE, 60 * PAGE); put(a, 1, 4)")
    before_registering(lambda: target.run("libc.mremap(a, 4 * PAGE, 8 * PAGE, 0, None)"))
    tracker.collect()
    moved = target.run("(b := libc.mremap(a, 8 * PAGE, 12 * PAGE, 1, None))")
    assert moved != FAILED
    target.run("put(b, 2, 12)")
    assert within(tracker.collect().dirty, moved, 12) == pages(moved, *range(12))


@pytest.mark.parametrize("first", [0, 1])
def test_what_comes_in_the_place_of_others_meanwhile_stays_one_mapping(
    target: Target, tracker: Tracker, before_registering: Callable[[Callable[[], object]], None], first: int
) -> None:
    """One that is known goes for a larger one, beside one that is new."""
    target.run("a = area(64); libc.munmap(a, 64 * PAGE)")
    stays, goes = (0, 32) if first else (32, 0)
    target.run(f"area(8, PRIVATE | ANON | FIXED, at=a + {goes + 4} * PAGE); put(a + {goes + 4} * PAGE, 1, 8)")
    tracker.collect()
    target.run(f"area(16, PRIVATE | ANON | FIXED, at=a + {stays} * PAGE); put(a + {stays} * PAGE, 1, 16)")
    before_registering(
        lambda: target.run(
            f"libc.munmap(a + {goes + 4} * PAGE, 8 * PAGE);"
            f"area(15, PRIVATE | ANON | FIXED, at=a + {goes + 1} * PAGE); put(a + {goes + 1} * PAGE, 2, 15)"
        )
    )
    tracker.collect()
    moved = target.run(f"(b := libc.mremap(a + {goes + 1} * PAGE, 15 * PAGE, 40 * PAGE, 1, None))")
    assert moved != FAILED
    assert within(tracker.collect().dirty, moved, 15) == pages(moved, *range(15))


CHURN = """
import random

def churn():
    dice, held, failed = random.Random(1), [], 0
    while going:
        if len(held) < 8:
            held.append([area(32), 32])
            put(held[-1][0], 1, 32)
            continue
        each = dice.choice(held)
        what = dice.randrange(4)
        size = {0: min(each[1] * 3 // 2, 96), 1: max(each[1] // 2, 2), 2: each[1], 3: 0}[what]
        if what == 3:
            held.remove(each)
            libc.munmap(each[0], each[1] * PAGE)
        elif what == 1:
            libc.munmap(each[0] + size * PAGE, (each[1] - size) * PAGE)
            each[1] = size
        else:
            target = area(size) if what == 2 else None
            moved = libc.mremap(each[0], each[1] * PAGE, size * PAGE, 3 if what == 2 else 1, target)
            failed += moved == FAILED
            each[:] = [moved, size] if moved != FAILED else each
            put(each[0], 2, each[1])
    results.append(failed)

going, results, FAILED = True, [], (1 << 64) - 1
busy = threading.Thread(target=churn)
busy.start()
"""


def test_a_process_that_remaps_all_the_time_is_never_refused(target: Target, tracker: Tracker) -> None:
    target.run(f"exec({CHURN!r}, globals())")
    for _ in range(300):
        tracker.collect()
    target.run("going = False")
    assert target.run("(busy.join(), results)[1]") == [0]


OBSTACLES = {
    "read-only": "(m := os.memfd_create('m'), os.ftruncate(m, 4 * PAGE), os.pwrite(m, b'x' * 4 * PAGE, 0),"
    " area(4, SHARED | FIXED, os.open(f'/proc/self/fd/{m}', os.O_RDONLY), at=a + 8 * PAGE, protection=1))",
    "droppable": "(area(4, 8 | ANON | FIXED, at=a + 8 * PAGE), put(a + 8 * PAGE, 1, 4))",
    "a userfaultfd of its own": "(u := libc.syscall(323, 1), fcntl.ioctl(u, 0xC018AA3F, struct.pack('3Q', 0xAA, 0, 0)),"
    " fcntl.ioctl(u, 0xC020AA00, struct.pack('4Q', a + 8 * PAGE, 4 * PAGE, 1, 0)))",
}


@pytest.mark.parametrize("kind", OBSTACLES)
def test_what_the_kernel_refuses_keeps_nothing_else_from_being_tracked(
    target: Target, tracker: Tracker, kind: str
) -> None:
    target.run("import fcntl")
    start = target.run("(a := area(20))")
    target.run("put(a, 1, 20)")
    target.run(OBSTACLES[kind])
    others = pages(start, *range(8), *range(12, 20))
    assert within(tracker.collect().dirty, start, 20) >= others
    target.run("put(a + 2 * PAGE, 2); put(a + 15 * PAGE, 2)")
    assert within(tracker.collect().dirty, start, 20) & others == pages(start, 2, 15)
    fresh = target.run("(b := area(20))")
    target.run("put(b, 1, 20)")
    assert not within(tracker.collect().dirty, start, 20) & others
    target.run("put(b, 2, 2)")
    assert within(tracker.collect().dirty, fresh, 20) == pages(fresh, 0, 1)


@pytest.mark.parametrize("second", ["droppable", "a userfaultfd of its own"])
def test_one_refused_mapping_after_the_other(target: Target, tracker: Tracker, second: str) -> None:
    """What was registered between the first time and the second is ours, whatever smaps says of it."""
    target.run("import fcntl")
    above = target.run("(a := area(20))")
    target.run("put(a, 1, 20); libc.munmap(a + 14 * PAGE, 4 * PAGE)")
    target.run(OBSTACLES["read-only"])
    tracker.collect()
    target.run("first = a; area(2, PRIVATE | ANON | FIXED, at=a + 15 * PAGE); put(a + 15 * PAGE, 1, 2)")
    below = target.run("(a := area(20))")
    target.run("put(a, 1, 20)")
    target.run(OBSTACLES[second])
    tracker.collect()
    target.run("put(first + PAGE, 2); put(first + 16 * PAGE, 2); put(a + PAGE, 2); put(a + 15 * PAGE, 2)")
    for _ in range(2):
        answer = tracker.collect().dirty
    assert within(answer, above, 20) <= pages(above, *range(8, 12))
    assert within(answer, below, 20) == pages(below, *range(8, 12))


def test_what_comes_in_the_place_of_a_refused_mapping_is_tracked(target: Target, tracker: Tracker) -> None:
    start = target.run("(a := area(20))")
    target.run("put(a, 1, 20)")
    target.run(OBSTACLES["read-only"])
    tracker.collect()
    target.run("area(6, PRIVATE | ANON | FIXED, at=a + 7 * PAGE); put(a + 7 * PAGE, 3, 6)")
    assert within(tracker.collect().dirty, start, 20) == pages(start, *range(7, 13))
    target.run("put(a + 9 * PAGE, 4)")
    assert within(tracker.collect().dirty, start, 20) == pages(start, 9)


def test_a_shared_mapping_that_becomes_writable_in_the_place_of_a_read_only_one_is_told(
    target: Target, tracker: Tracker
) -> None:
    """The same file at the same place, with the same permissions, as far as maps tells."""
    start = target.run("(a := area(20))")
    target.run(OBSTACLES["read-only"])
    tracker.collect()
    target.run("libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)")
    target.run("area(4, SHARED | FIXED, m, at=a + 8 * PAGE, protection=1)")
    tracker.collect()
    target.run(
        "libc.mprotect(a + 8 * PAGE, 4 * PAGE, 3); put(a + 9 * PAGE, 5); libc.mprotect(a + 8 * PAGE, 4 * PAGE, 1)"
    )
    assert within(tracker.collect().dirty, start, 20) >= pages(start, 9)


def test_what_loses_its_registration_to_a_neighbour_is_told(target: Target, tracker: Tracker) -> None:
    """mremap(2) that makes one mapping of what it moves and what lies beside it takes both from the userfaultfd, and
    leaves the marks of what it did not move."""
    start = target.run("(a := area(64))")
    target.run("put(a, 1, 64); away = area(32)")
    tracker.collect()
    target.run("libc.mremap(a + 32 * PAGE, 32 * PAGE, 32 * PAGE, 3, away)")
    tracker.collect()
    target.run("libc.mremap(away, 32 * PAGE, 32 * PAGE, 3, a + 32 * PAGE); put(a + 3 * PAGE, 2)")
    assert within(tracker.collect().dirty, start, 64) >= pages(start, 3)
    target.run("put(a + 3 * PAGE, 3); put(a + 5 * PAGE, 3)")
    assert within(tracker.collect().dirty, start, 64) == pages(start, 3, 5)


@pytest.mark.parametrize("joined", [False, True])
def test_what_loses_its_registration_directly_before_the_freeze_is_counted(
    target: Target, tracker: Tracker, joined: bool
) -> None:
    start = target.run("(a := area(64))")
    target.run("put(a, 1, 64); away = area(32); libc.mremap(a + 32 * PAGE, 32 * PAGE, 32 * PAGE, 3, away)")
    tracker.collect()
    if joined:
        target.run("libc.mremap(away, 32 * PAGE, 32 * PAGE, 3, a + 32 * PAGE)")
    last = tracker.collect(last=True)
    assert len(within(last.dirty, start, 64)) == (64 if joined else 0)
    assert last.unwatched_pages == (32 if joined else 0), "those that moved are new at this address"
