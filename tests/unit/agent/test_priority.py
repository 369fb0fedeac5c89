"""Paces of this process, and of what it has started."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.agent.priority import set_pace, step_back


@pytest.fixture
def child() -> Iterator[int]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process.pid
        process.kill()
    set_pace("usual")


def pace_of(pid: int) -> tuple[int, int]:
    return os.sched_getscheduler(pid), os.getpriority(os.PRIO_PROCESS, pid)


@pytest.mark.skipif(os.geteuid() != 0, reason="going before others needs root")
def test_what_was_started_in_the_background_becomes_urgent_too(child: int) -> None:
    set_pace("background")
    assert pace_of(0) == (os.SCHED_BATCH, 19)
    with subprocess.Popen(["sleep", "1000"]) as late:
        assert pace_of(late.pid) == (os.SCHED_BATCH, 19)
        set_pace("urgent")
        assert pace_of(0) == pace_of(child) == pace_of(late.pid) == (os.SCHED_OTHER, -10)
        late.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="going before others needs root")
def test_only_the_agent_itself_goes_back_to_usual(child: int) -> None:
    """Below it may be restored tasks, which have a pace of their own."""
    set_pace("urgent")
    set_pace("usual")
    assert pace_of(0) == (os.SCHED_OTHER, 0)
    assert pace_of(child) == (os.SCHED_OTHER, -10)


@pytest.mark.skipif(os.geteuid() != 0, reason="going before others needs root")
def test_what_was_urgent_steps_back(child: int) -> None:
    set_pace("urgent")
    step_back([child, 1 << 22])
    assert pace_of(child) == (os.SCHED_BATCH, 19)
    assert pace_of(0) == (os.SCHED_OTHER, -10)


SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}
OWN_SLICES = tuple(map(int, platform.release().split(".")[:2])) >= (6, 12)


def slice_ns() -> int:
    """This thread's own (sched_getattr(2)): sched_runtime, after 24 bytes."""
    attributes = ctypes.create_string_buffer(48)
    assert ctypes.CDLL(None).syscall(SCHED_GETATTR[platform.machine()], 0, attributes, len(attributes), 0) == 0
    return int(struct.unpack_from("=Q", attributes, 24)[0])


@pytest.mark.skipif(os.geteuid() != 0, reason="going before others needs root")
@pytest.mark.skipif(not OWN_SLICES, reason="before Linux 6.12 threads have no slices of their own")
def test_in_the_background_nobody_waits_longer_than_a_tenth_of_a_millisecond(child: int) -> None:
    as_everybody = slice_ns()
    set_pace("background")
    assert slice_ns() == 100_000
    set_pace("urgent")
    assert slice_ns() == as_everybody > 100_000


PACES = """
from pathlib import Path
from coordinator.agent.priority import press_on, set_pace
def tell():
    print(Path("/proc/self/autogroup").read_text().split()[-1])
for pace in ("background", "urgent", "usual", "background"):
    set_pace(pace)
    tell()
for pressing in (True, False):
    press_on(pressing)
    tell()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="going before others needs root")
@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel has no autogroups")
def test_the_session_goes_along() -> None:
    command = [sys.executable, "-c", PACES]
    said = subprocess.run(command, start_new_session=True, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["19", "-10", "0", "19", "10", "19"]
