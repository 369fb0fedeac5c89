"""CRIU's nap ends when everything is frozen, and it is told when all tasks stand still.

A real process sleeps for CRIU, under its name; for its tracer this one stands."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from coordinator.agent import freeze_watch
from coordinator.agent.freeze_watch import FreezeWatch, end_sleep, is_frozen, sleepers, stand_still
from coordinator.agent.memory import ptrace
from coordinator.agent.memory.registers import Arm64Machine, this_machine

#: Sleeps as CRIU does, and says how that ended: 0, or -1 with EINTR.
NAP = """
import ctypes, sys
class Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))
libc = ctypes.CDLL(None, use_errno=True)
print("asleep", flush=True)
print(libc.nanosleep(ctypes.byref(Time(1000, 0)), None), ctypes.get_errno(), flush=True)
"""


@pytest.fixture
def napping() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", f"open('/proc/self/comm', 'w').write('criu'){NAP}"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "asleep\n"
    while sleepers(process.pid) != [process.pid]:
        time.sleep(0.001)
    yield process
    process.kill()
    process.communicate()


def test_a_sleep_is_ended(napping: subprocess.Popen[str]) -> None:
    machine = this_machine()
    assert machine is not None
    assert end_sleep(napping.pid, machine)
    assert napping.communicate(timeout=20)[0] == "-1 4\n"


def test_another_call_goes_on() -> None:
    machine = this_machine()
    assert machine is not None
    with subprocess.Popen([shutil.which("cat") or "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        while not Path(f"/proc/{process.pid}/syscall").read_text().startswith("0 "):
            time.sleep(0.001)
        assert not end_sleep(process.pid, machine)
        assert process.communicate(b"more")[0] == b"more"
    assert not end_sleep(process.pid, machine)


def test_the_nap_ends_when_all_are_frozen(
    napping: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = tmp_path / "cgroup.events"
    events.write_text("populated 1\nfrozen 0\n")
    monkeypatch.setattr(freeze_watch, "frozen_file", lambda _: events)
    watch = FreezeWatch(os.getpid(), os.getpid())
    watch.begin()
    assert not is_frozen(events)
    assert sleepers(os.getpid()) == [napping.pid]
    events.write_text("populated 1\nfrozen 1\n")
    assert napping.communicate(timeout=20)[0] == "-1 4\n"
    watch.end()
    while not watch.woken:
        time.sleep(0.001)


WAIT_ALL = 0x40000000  # __WALL of waitpid(2)

#: A process with a second thread and a child. Says its thread ids and its child's pid.
TASKS = """
import os, threading, time
thread = threading.Thread(target=time.sleep, args=(1000,), daemon=True)
thread.start()
child = os.fork()
if child:
    print(os.getpid(), thread.native_id, child, flush=True)
time.sleep(1000)
"""


@pytest.fixture
def tasks() -> Iterator[list[int]]:
    with subprocess.Popen([sys.executable, "-c", TASKS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = [int(word) for word in process.stdout.readline().split()]
        yield found
        for pid in (found[2], process.pid):
            os.kill(pid, signal.SIGKILL)
        for task in found[1:]:  # who has stopped a task is waited for when it ends
            with suppress(ChildProcessError):
                os.waitpid(task, WAIT_ALL)


def stop(task: int) -> None:
    """What CRIU does to each."""
    ptrace.seize(task, 0)
    ptrace.request(ptrace.INTERRUPT, task)
    ptrace.wait_stop(task, 20)


def watching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "freeze-watch"]


def ended() -> None:
    for thread in watching():
        thread.join(20)
    assert not watching()


def test_tasks_stand_still_when_all_of_them_are_stopped(tasks: list[int]) -> None:
    root = tasks[0]
    for number, task in enumerate(tasks):
        assert not stand_still(root, os.getpid()), f"{number} of 3 are stopped"
        stop(task)
    assert stand_still(root, os.getpid())
    assert not stand_still(root, root), "somebody else has stopped them"
    ptrace.request(ptrace.DETACH, tasks[1])
    assert not stand_still(root, os.getpid())


def test_a_tree_that_is_gone_does_not_stand_still() -> None:
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    assert not stand_still(child, os.getpid())


def test_who_wants_to_know_is_told_when_all_stand_still(tasks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the root is traced, and not when all but the last are stopped."""
    monkeypatch.setattr(freeze_watch, "_STILL_S", 1000.0)
    looks: list[bool] = []
    told: list[int] = []

    def looking(root_pid: int, command: int) -> bool:
        looks.append(stand_still(root_pid, command))
        return looks[-1]

    monkeypatch.setattr(freeze_watch, "stand_still", looking)
    watch = FreezeWatch(os.getpid(), tasks[0], lambda: told.append(len(looks)))
    watch.begin()
    for task in tasks:
        assert not any(looks)
        stop(task)
        seen = len(looks)
        while len(looks) < seen + 2 and not told:  # one may have begun before
            time.sleep(0.001)
    ended()
    assert looks == [False] * (len(looks) - 1) + [True]
    assert told == [len(looks)]


def test_the_watch_ends_when_the_root_is_traced(
    napping: subprocess.Popen[str], tasks: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no nap any more, whoever sleeps, and nobody wants to know the rest."""
    events = tmp_path / "cgroup.events"
    events.write_text("populated 1\nfrozen 0\n")
    monkeypatch.setattr(freeze_watch, "frozen_file", lambda _: events)
    watch = FreezeWatch(os.getpid(), tasks[0])
    watch.begin()
    assert watching()
    stop(tasks[0])
    ended()
    events.write_text("populated 1\nfrozen 1\n")
    assert not watch.woken
    assert sleepers(os.getpid()) == [napping.pid]


def test_a_look_that_fails_is_left_to_who_looks_next(tasks: list[int]) -> None:
    def failing() -> None:
        raise OSError(24, "Too many open files")

    for task in tasks:
        stop(task)
    watch = FreezeWatch(os.getpid(), tasks[0], failing)
    watch.begin()
    ended()


def test_on_arm64_the_call_is_passed_over() -> None:
    machine = Arm64Machine()
    asleep = b"".join((0).to_bytes(8, "little") for _ in range(8)) + (115).to_bytes(8, "little")
    registers = (asleep + bytes(23 * 8) + (0).to_bytes(8, "little") + (0x4000).to_bytes(8, "little")).ljust(
        34 * 8, b"\0"
    )
    ended = machine.end_sleep(registers)
    assert ended is not None
    assert machine.result(ended) == -4
    assert machine.instruction_pointer(ended) == machine.instruction_pointer(registers) + 4
    assert machine.end_sleep(bytes(34 * 8)) is None
