"""The contract of `TreeTracker`, over real process trees on this kernel."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from coordinator.agent.memory.base import PAGE_BYTES
from coordinator.agent.memory.ptrace import TargetGone
from coordinator.agent.memory.tree import TreeTracker
from coordinator.errors import TrackingFailed
from tests.contract.memory_target import CHOICE, Keeper, Target, make_tracker, names, pages, state, until, within

pytestmark = pytest.mark.skipif(CHOICE.make is None, reason=CHOICE.reason)


def test_a_child_that_is_there_is_tracked(target: Target) -> None:
    start = target.run("(a := area(4))")
    child = target.fork("put(a, 5, 2)")
    until(lambda: state(child) == "S")
    with contextlib.closing(TreeTracker(target.pid, make_tracker)) as tree:
        first = tree.collect()
        assert first.keys() == {target.pid, child}
        assert all(each.fresh and each.untracked is None for each in first.values())
        assert within(first[child].changes.dirty, start, 4) == pages(start, 0, 1)
        second = tree.collect()
        assert not second[child].fresh
        assert not within(second[child].changes.dirty, start, 4)


def test_a_child_that_appears_is_dirty_as_a_whole(target: Target) -> None:
    start = target.run("(a := area(4))")
    target.run("put(a, 1, 4)")
    with contextlib.closing(TreeTracker(target.pid, make_tracker)) as tree:
        tree.collect()
        child = target.fork("put(a, 5)")
        until(lambda: state(child) == "S")
        answer = tree.collect()[child]
        assert answer.fresh
        assert within(answer.changes.dirty, start, 4) == pages(start, 0, 1, 2, 3)
        assert not within(tree.collect()[child].changes.dirty, start, 4)


def test_a_child_that_goes_is_named_once(target: Target) -> None:
    child = target.fork()
    with contextlib.closing(TreeTracker(target.pid, make_tracker)) as tree:
        tree.collect()
        os.kill(child, signal.SIGKILL)
        target.run(f"os.waitpid({child}, 0)[0]")
        assert tree.collect().keys() == {target.pid}
        assert tree.take_gone() == (child,)
        assert tree.take_gone() == ()


LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


def test_a_pid_that_is_used_again_between_two_rounds_names_another_process(target: Target) -> None:
    start = target.run("(a := area(8))")
    target.run("put(a, 1, 4)")
    child = target.fork("put(a, 5, 6)")
    until(lambda: state(child) == "S")
    with contextlib.closing(TreeTracker(target.pid, make_tracker)) as tree:
        first = tree.collect()[child]
        # Start times are told in clock ticks: no pid comes round within one, but here it could.
        until(lambda: time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK") > first.started + 2)
        os.kill(child, signal.SIGKILL)
        target.run(f"os.waitpid({child}, 0)[0]")
        for _ in range(100):  # another process on this machine may be quicker
            LAST_PID.write_text(str(child - 1))
            if (pid := target.fork()) == child:
                break
        assert pid == child
        until(lambda: state(child) == "S")
        second = tree.collect()[child]
        assert second.fresh
        assert second.started > first.started
        assert within(second.changes.dirty, start, 8) == pages(start, 0, 1, 2, 3)
        assert child in tree.take_gone()
        assert not tree.collect()[child].fresh


def test_a_zombie_is_gone(target: Target) -> None:
    child = target.fork()
    with contextlib.closing(TreeTracker(target.pid, make_tracker)) as tree:
        os.kill(child, signal.SIGKILL)
        until(lambda: state(child) == "Z")
        assert tree.collect().keys() == {target.pid}


def test_a_root_that_goes_says_so(target: Target) -> None:
    with contextlib.closing(TreeTracker(target.pid, make_tracker)) as tree:
        tree.collect()
        target.process.kill()
        target.process.wait()
        with pytest.raises(TargetGone):
            tree.collect()


def test_the_inner_pid_is_that_of_the_images(target: Target) -> None:
    assert target.run("libc.unshare(0x20000000)") == 0  # CLONE_NEWPID: the next child is 1 in there
    child = target.fork()
    with contextlib.closing(TreeTracker(target.pid, make_tracker)) as tree:
        answers = tree.collect()
        assert answers[target.pid].inner_pid == target.pid
        assert answers[child].inner_pid == 1


def test_a_child_before_exec_speaks_through_its_parent(target: Target) -> None:
    """vfork: the child has the parent's memory; it is neither stopped nor answered for."""
    with contextlib.closing(TreeTracker(target.pid, make_tracker)) as tree:
        tree.collect()
        target.send("__import__('subprocess').run(['sleep', '0.3']).returncode")
        until(lambda: tree.collect().keys() - {target.pid})
        assert target.answer() == 0
        assert tree.collect().keys() == {target.pid}


def test_one_that_cannot_be_tracked_spoils_it_at_the_start_and_not_later(target: Target) -> None:
    first = target.fork()
    with Target() as debugger:
        debugger.run(f"libc.ptrace(0x4206, {first}, None, None)")
        with pytest.raises(TrackingFailed, match="traced"):
            TreeTracker(target.pid, make_tracker)
    before = names(f"/proc/{target.pid}/fd")
    with contextlib.closing(TreeTracker(target.pid, make_tracker)) as tree, Target() as debugger:
        tree.collect()
        second = target.fork("put(area(1), 1)")
        debugger.run(f"libc.ptrace(0x4206, {second}, None, None)")
        for _ in range(2):
            answer = tree.collect()[second]
            assert answer.fresh
            assert answer.changes.dirty_pages == answer.changes.known_pages
            assert answer.untracked is not None
            assert "traced" in answer.untracked
    assert names(f"/proc/{target.pid}/fd") == before


def test_shared_memory_is_the_union_of_all_answers(target: Target) -> None:
    """Each process tells what it wrote; what the other wrote is told by the other."""
    start = target.run("(a := area(8, SHARED | ANON))")
    target.run("put(a, 1, 8)")
    inside, outside = os.pipe()
    child = target.fork(f"os.read(os.open('/proc/{os.getpid()}/fd/{inside}', 0), 1); put(a + 5 * PAGE, 9)")
    with contextlib.closing(TreeTracker(target.pid, make_tracker)) as tree:
        tree.collect()
        os.write(outside, b"x")
        target.run("put(a, 2)")
        told: set[int] = set()
        for _ in range(10_000):
            answers = tree.collect()
            told |= within(answers[target.pid].changes.dirty, start, 8) | within(answers[child].changes.dirty, start, 8)
            if told >= pages(start, 0, 5):
                break
        assert told == pages(start, 0, 5)
    os.close(inside)
    os.close(outside)


@pytest.mark.parametrize("leaves", ["nothing", "a zombie", "nothing, as SIGCHLD is ignored"])
def test_shared_memory_that_an_unseen_child_wrote_to_is_dirty(target: Target, leaves: str) -> None:
    """A page that is read first comes in writable, so that the object's times do not tell of the write either."""
    start = target.run("(a := area(8, SHARED | ANON))")
    target.run("put(a, 1, 8)")
    if leaves.endswith("ignored"):
        target.run("str(signal.signal(signal.SIGCHLD, signal.SIG_IGN))")
    with contextlib.closing(TreeTracker(target.pid, make_tracker)) as tree:
        tree.collect()
        tree.collect()
        child = target.fork("ctypes.string_at(a + 5 * PAGE, 1); put(a + 5 * PAGE, 9); os._exit(0)")
        if leaves == "nothing":
            target.run(f"os.waitpid({child}, 0)[0]")
        else:
            until(lambda: not Path(f"/proc/{child}").exists() or state(child) == "Z")
        target.children.remove(child)
        assert start + 5 * PAGE_BYTES in within(tree.collect(last=True)[target.pid].changes.dirty, start, 8)


def test_shared_memory_that_a_child_wrote_to_before_it_went_is_dirty(target: Target) -> None:
    start = target.run("(a := area(8, SHARED | ANON))")
    target.run("put(a, 1, 8)")
    inside, outside = os.pipe()
    child = target.fork(f"os.read(os.open('/proc/{os.getpid()}/fd/{inside}', 0), 1); put(a + 5 * PAGE, 9); os._exit(0)")
    with contextlib.closing(TreeTracker(target.pid, make_tracker)) as tree:
        tree.collect()
        tree.collect()
        os.write(outside, b"x")
        target.run(f"os.waitpid({child}, 0)[0]")
        target.children.remove(child)
        assert start + 5 * PAGE_BYTES in within(tree.collect()[target.pid].changes.dirty, start, 8)
        assert not within(tree.collect()[target.pid].changes.dirty, start, 8)
    os.close(inside)
    os.close(outside)


BROOD = """
def brood():
    while True:
        pid = os.fork()
        if not pid:
            put(a, os.getpid() & 255, 8)
            time.sleep(0.01) if os.getpid() % 5 else signal.pause()
            os._exit(0)
        put(a + 8 * PAGE, pid & 255, 8)
        if pid % 5:
            os.waitpid(pid, 0)
        else:
            time.sleep(0.05)
"""


def test_forks_under_way_lose_no_byte(target: Target) -> None:
    """Children come and go and write; everything is stopped in the end, and every process compared."""
    target.run("a = area(64)")
    target.run(f"exec({BROOD!r}, globals())")
    keepers: dict[int, Keeper] = {}
    target.send("brood()")
    with contextlib.closing(TreeTracker(target.pid, make_tracker)) as tree:
        for _ in range(20):
            _take(tree, keepers)
        members: set[int] = set()
        while members != (now := set(_descendants(target.pid))):
            members = now
            for pid in now:
                with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it ended before
                    os.kill(pid, signal.SIGSTOP)
                    until(lambda pid=pid: state(pid) in "TZ")  # type: ignore[misc]
        target.children.extend(members - {target.pid})
        answers = _take(tree, keepers, last=True)
        assert answers == {pid for pid in _descendants(target.pid) if state(pid) == "T"}
        for pid in answers:
            assert keepers[pid].wrong_bytes(pid) == 0


def _take(tree: TreeTracker, keepers: dict[int, Keeper], last: bool = False) -> set[int]:
    answers = tree.collect(last=last)
    for pid in tree.take_gone():
        keepers.pop(pid, None)
    for pid, answer in answers.items():
        keeper = keepers.setdefault(pid, Keeper())
        if answer.fresh:
            keeper.pages.clear()
        keeper.apply(pid, answer.changes)
    return set(answers)


def _descendants(pid: int) -> list[int]:
    found = [pid]
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += _descendants(int(child))
    return found
