"""The contract of `Tracker`, over real processes on this kernel."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from coordinator.agent import tasks
from coordinator.agent.memory.base import PAGE_BYTES, Changes, Tracker
from coordinator.agent.memory.pages import read_pages
from coordinator.agent.memory.ptrace import TargetGone
from tests.contract.memory_target import (
    CHOICE,
    PROGRAM,
    Keeper,
    Target,
    addresses,
    make_tracker,
    memory_of,
    names,
    pages,
    state,
    until,
    within,
)

pytestmark = pytest.mark.skipif(CHOICE.make is None, reason=CHOICE.reason)

FILE = "(fd := os.open('/var/tmp', os.O_TMPFILE | os.O_RDWR), os.write(fd, b'f' * 65536))[0]"
MAKE = {
    "private": "area(16)",
    "shared anonymous": "area(16, SHARED | ANON)",
    "memfd": "area(16, SHARED, (fd := os.memfd_create('m'), os.ftruncate(fd, 16 * PAGE))[0])",
    "shm file": "area(16, SHARED, (fd := os.open('/dev/shm', os.O_TMPFILE | os.O_RDWR), os.ftruncate(fd, 65536))[0])",
    "file private": f"area(16, PRIVATE, {FILE})",
    "file shared": f"area(16, SHARED, {FILE})",
}


@pytest.mark.parametrize("kind", MAKE)
def test_what_is_written_is_told_once(target: Target, tracker: Tracker, kind: str) -> None:
    start = target.run(f"(a := {MAKE[kind]})")
    target.run("put(a, 1); put(a + 5 * PAGE, 1)")
    first = tracker.collect()
    assert within(first.dirty, start, 16) >= pages(start, 0, 5)
    until(lambda: not within(tracker.collect().dirty, start, 16))  # a shared object's times have to settle first
    target.run("put(a + 5 * PAGE, 2); put(a + 7 * PAGE, 2)")
    told = within(tracker.collect().dirty, start, 16)
    # What has a descriptor could have been written through it just as well: it is then dirty as a whole.
    assert told == pages(start, 0, 5, 7) if kind in ("memfd", "shm file") else told == pages(start, 5, 7)
    until(lambda: not within(tracker.collect().dirty, start, 16))


@pytest.mark.parametrize("kind", ["private", "file private"])
def test_untouched_and_read_pages_cost_nothing(target: Target, tracker: Tracker, kind: str) -> None:
    start = target.run(f"(a := {MAKE[kind]})")
    target.run("put(a + PAGE, 1); ctypes.string_at(a + 2 * PAGE, 1)")
    assert within(tracker.collect().dirty, start, 16) == pages(start, 1)


def test_memory_written_before_attaching_is_told(target: Target) -> None:
    start = target.run("(a := area(4))")
    target.run("put(a, 1, 4)")
    with contextlib.closing(make_tracker(target.pid)) as tracker:
        assert within(tracker.collect().dirty, start, 4) == pages(start, 0, 1, 2, 3)


def test_discarded_pages_are_dropped(target: Target, tracker: Tracker) -> None:
    start = target.run("(a := area(8))")
    target.run("put(a, 1, 8)")
    tracker.collect()
    target.run("libc.madvise(a, 4 * PAGE, 4); put(a, 2); ctypes.string_at(a + PAGE, 1)")
    changes = tracker.collect()
    assert within(changes.dirty, start, 8) == pages(start, 0)
    assert within(changes.dropped, start, 8) == pages(start, 1, 2, 3)
    assert not within(tracker.collect().dropped, start, 8)


def test_discarded_pages_of_a_file_read_as_the_file(target: Target, tracker: Tracker) -> None:
    start = target.run(f"(a := {MAKE['file private']})")
    target.run("put(a, 1, 4)")
    keeper = Keeper()
    keeper.apply(target.pid, tracker.collect())
    target.run("libc.madvise(a, 4 * PAGE, 4); ctypes.string_at(a + PAGE, 1)")
    keeper.apply(target.pid, tracker.collect())
    for address in pages(start, 0, 1, 2, 3):
        assert keeper.pages.get(address, b"f" * PAGE_BYTES) == b"f" * PAGE_BYTES


def test_a_new_mapping_at_an_old_address_is_dirty(target: Target, tracker: Tracker) -> None:
    start = target.run("(a := area(8))")
    target.run("put(a, 1, 8)")
    tracker.collect()
    target.run("libc.munmap(a, 8 * PAGE); area(8, PRIVATE | ANON | FIXED, at=a); put(a + PAGE, 1, 2)")
    changes = tracker.collect()
    assert within(changes.dirty, start, 8) == pages(start, 1, 2)
    assert within(changes.dropped, start, 8) == pages(start, 0, *range(3, 8))
    target.run("put(a + PAGE, 3)")
    assert within(tracker.collect().dirty, start, 8) == pages(start, 1)


def test_moved_memory_is_dirty_where_it_is_now(target: Target, tracker: Tracker) -> None:
    start = target.run("(a := area(8))")
    there = target.run("(b := area(8))")
    target.run("put(a, 1, 8)")
    tracker.collect()
    assert target.run("libc.mremap(a, 8 * PAGE, 8 * PAGE, 3, b)") == there  # MREMAP_MAYMOVE | MREMAP_FIXED
    changes = tracker.collect()
    assert within(changes.dirty, there, 8) == pages(there, *range(8))
    assert within(changes.dropped, start, 8) == pages(start, *range(8))
    assert not within(tracker.collect().dirty, there, 8)
    target.run("put(b + 3 * PAGE, 1)")
    assert within(tracker.collect().dirty, there, 8) == pages(there, 3)


def test_memory_that_grows_in_place_is_told(target: Target, tracker: Tracker) -> None:
    start = target.run("(a := area(64))")
    target.run("libc.munmap(a + 8 * PAGE, 56 * PAGE); put(a, 1, 8)")
    tracker.collect()
    assert target.run("libc.mremap(a, 8 * PAGE, 64 * PAGE, 0, None)") == start
    target.run("put(a + 20 * PAGE, 1, 2)")
    assert within(tracker.collect().dirty, start, 64) == pages(start, 20, 21)
    target.run("put(a + 20 * PAGE, 2); put(a + 3 * PAGE, 2)")
    assert within(tracker.collect().dirty, start, 64) == pages(start, 3, 20)


def test_a_growing_heap_is_told(target: Target, tracker: Tracker) -> None:
    libc = "libc.sbrk.restype = ctypes.c_void_p; a = libc.sbrk(8 * PAGE) // PAGE * PAGE + PAGE; put(a, 1, 4)"
    tracker.collect()
    target.run(libc)
    start = target.run("a")
    assert within(tracker.collect().dirty, start, 4) == pages(start, 0, 1, 2, 3)
    target.run("put(a + PAGE, 2)")
    assert within(tracker.collect().dirty, start, 4) >= pages(start, 1)


def test_protections_may_change(target: Target, tracker: Tracker) -> None:
    start = target.run("(a := area(4))")
    target.run("libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)")
    target.run("put(a, 1, 4); libc.mprotect(a, 4 * PAGE, 1)")
    assert within(tracker.collect().dirty, start, 4) == pages(start, 0, 1, 2, 3)
    target.run("libc.mprotect(a, 4 * PAGE, 0)")
    assert not within(tracker.collect().dropped, start, 4)
    target.run("libc.mprotect(a, 4 * PAGE, 3); put(a + PAGE, 2)")
    assert within(tracker.collect().dirty, start, 4) == pages(start, 1)


def test_memory_that_becomes_lazy_is_dirty(target: Target, tracker: Tracker) -> None:
    start = target.run("(a := area(4))")
    target.run("put(a, 1, 4); libc.mlock.argtypes = libc.munlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)")
    assert target.run("libc.mlock(a, 4 * PAGE)") == 0
    changes = tracker.collect()
    assert [each.locked for each in changes.mappings if each.start == start] == [True]
    assert not within(tracker.collect().dirty, start, 4)
    assert target.run("libc.munlock(a, 4 * PAGE)") == 0
    assert within(tracker.collect().dirty, start, 4) == pages(start, 0, 1, 2, 3)


def test_the_kernel_writes_too(target: Target, tracker: Tracker) -> None:
    start = target.run("(a := area(4))")
    target.run("put(a, 1, 4); libc.pread.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long)")
    tracker.collect()
    assert target.run("libc.pread(os.open(sys.executable, 0), a + 2 * PAGE, 100, 0)") == 100
    assert within(tracker.collect().dirty, start, 4) == pages(start, 2)


def test_shared_memory_changed_by_descriptor_is_told(target: Target, tracker: Tracker) -> None:
    start = target.run(f"(a := {MAKE['memfd']})")
    target.run("put(a, 1, 4)")
    until(lambda: not within(tracker.collect().dirty, start, 16))
    target.run("os.pwrite(fd, b'x', PAGE); os.pwrite(fd, b'x', 9 * PAGE)")
    keeper = Keeper()
    keeper.apply(target.pid, tracker.collect())
    assert keeper.pages[start + PAGE_BYTES][:1] == b"x"
    assert keeper.pages[start + 9 * PAGE_BYTES][:1] == b"x"
    target.run("libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)")
    assert target.run("libc.fallocate(fd, 3, 0, PAGE)") == 0  # punch a hole
    assert within(tracker.collect().dropped, start, 16) == pages(start, 0)


def test_a_fork_leaves_the_parent_tracked(target: Target, tracker: Tracker) -> None:
    start = target.run("(a := area(4))")
    target.run("put(a, 1, 4)")
    tracker.collect()
    target.fork("put(a, 9, 4)")
    target.run("put(a + PAGE, 2)")
    assert within(tracker.collect().dirty, start, 4) == pages(start, 1)


def test_another_program_is_all_dirty(target: Target, tracker: Tracker) -> None:
    keeper = Keeper()
    target.run("put(area(4), 1, 4)")
    keeper.apply(target.pid, tracker.collect())
    before = Path(f"/proc/{target.pid}/auxv").read_bytes()
    target.send("os.execv(sys.executable, [sys.executable, '-c', " + repr(PROGRAM) + "])")
    until(lambda: Path(f"/proc/{target.pid}/auxv").read_bytes() not in (before, b""))
    target.run("(b := area(4), put(b, 1))[0] and None")
    there = target.run("b")
    for code in ("0", "put(b + PAGE, 1)"):
        keeper.apply(target.pid, tracker.collect())
        target.run(code)
    changes = tracker.collect()
    assert within(changes.dirty, there, 4) == pages(there, 1)
    keeper.apply(target.pid, changes)
    stop(target)
    keeper.apply(target.pid, tracker.collect(last=True))
    assert keeper.wrong_bytes(target.pid) == 0


def test_a_process_that_ends_says_so(target: Target, tracker: Tracker) -> None:
    changes = tracker.collect()
    target.process.kill()
    target.process.wait()
    with pytest.raises(TargetGone):
        tracker.collect()
    batches = list(read_pages(target.pid, changes.dirty))
    assert not any(batch.runs for batch in batches)
    assert {page for batch in batches for page in addresses(batch.vanished)} == addresses(changes.dirty)
    tracker.close()


def test_pages_that_vanish_spoil_no_others(target: Target, tracker: Tracker) -> None:
    start = target.run("(a := area(16))")
    target.run("put(a, 7, 16)")
    changes = tracker.collect()
    target.run("libc.munmap(a + 4 * PAGE, 2 * PAGE)")
    keeper = Keeper()
    keeper.apply(target.pid, changes)
    assert keeper.pages.keys() & pages(start, *range(16)) == pages(start, *range(4), *range(6, 16))


def test_nothing_is_left_after_closing(target: Target) -> None:
    before = names(f"/proc/{target.pid}/fd")
    for _ in range(3):
        tracker = make_tracker(target.pid)
        tracker.collect()
        tracker.close()
        tracker.close()
    assert names(f"/proc/{target.pid}/fd") == before
    flags = [line for line in Path(f"/proc/{target.pid}/smaps").read_text().splitlines() if line.startswith("VmFlags")]
    assert not any({"uw", "um", "ui"} & set(line.split()) for line in flags)
    assert target.run("40 + 2") == 42


WRITERS = """
import random

def change(random_, n, page):
    what = random_.randrange(400)
    if what == 0:
        libc.madvise(areas[n] + page * PAGE, (64 - page) * PAGE, 4)
    elif what == 1:
        junk.append(bytes([page]) * random_.randrange(1, 1 << 20))
    elif what == 2:
        junk.clear()
    elif alone and what == 3 and n < 4:
        libc.munmap(areas[n], 64 * PAGE)
        area(64, PRIVATE | ANON | FIXED, at=areas[n])
    elif alone and what == 4 and n in moving:
        areas[n] = libc.mremap(areas[n], 64 * PAGE, 64 * PAGE, 3, areas[n] ^ 1 << 30)

def writer(seed):
    random_ = random.Random(seed)
    while True:
        n, page = random_.randrange(len(areas)), random_.randrange(64)
        libc.memset(areas[n] + page * PAGE + random_.randrange(60) * 64, random_.randrange(256), 64)
        change(random_, n, page)

junk, moving = [], (0, 1, 2, 3, 5, 7)  # 4 and 6 stay
areas = [area(64, at=0x600000000000 + (n << 31)) for n in range(4)]
areas += [area(64, at=0x610000000000 + n * 64 * PAGE) for n in range(4)]  # one mapping, until one of them moves
areas += [area(64, SHARED | ANON) for n in range(2)]
areas.append(area(1024) + (2 << 20) - 1 & -(2 << 20))
libc.madvise(areas[-1], 2 << 20, 14)  # MADV_HUGEPAGE
"""


@pytest.mark.parametrize("threads", [1, 4])
def test_not_one_byte_differs_after_rounds_under_writes(target: Target, tracker: Tracker, threads: int) -> None:
    """Rounds while the target writes, discards, maps and moves; then it is stopped, and all of its memory compared.

    With several threads none maps or moves: a write to what another has just moved would be the target's own fault."""
    target.run(f"exec({WRITERS!r}, globals())")
    target.run(f"alone = {threads == 1}")
    keeper = Keeper()
    for seed in range(threads):
        target.run(f"threading.Thread(target=writer, args=({seed},), daemon=True).start()")
    for _ in range(40):
        keeper.apply(target.pid, tracker.collect())
    stop(target)
    last = tracker.collect(last=True)
    keeper.apply(target.pid, last)
    assert keeper.wrong_bytes(target.pid) == 0
    assert keeper.wrong_bytes(target.pid, lambda each: each.name == "/dev/zero (deleted)") == 0
    os.kill(target.pid, signal.SIGCONT)
    assert target.run("40 + 2") == 42


def stop(target: Target) -> None:
    """Stop every thread: that the first has stopped says nothing of one that is still writing."""
    os.kill(target.pid, signal.SIGSTOP)
    until(lambda: all(state(thread) == "T" for thread in tasks.threads(target.pid)))


def test_an_answer_is_consistent(target: Target, tracker: Tracker) -> None:
    changes: Changes = tracker.collect()
    assert changes.dirty == tuple(sorted(changes.dirty))
    assert changes.known_pages == changes.dirty_pages
    for run in changes.dirty:
        assert any(each.start <= run.start and run.end <= each.end for each in changes.mappings)
    private = next(
        run for run in changes.dirty for each in changes.mappings if each.lazy and each.start <= run.start < each.end
    )
    assert memory_of(target.pid, private.start, PAGE_BYTES)
