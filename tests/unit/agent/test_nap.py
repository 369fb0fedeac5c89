"""CRIU's nap ends when everything is frozen; a real process sleeps for it, under CRIU's name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.agent import nap
from coordinator.agent.memory.registers import Arm64Machine, this_machine
from coordinator.agent.nap import NapWatch, end_sleep, is_frozen, sleepers

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
    monkeypatch.setattr(nap, "frozen_file", lambda _: events)
    watch = NapWatch(os.getpid(), os.getpid())
    watch.begin()
    assert not is_frozen(events)
    assert sleepers(os.getpid()) == [napping.pid]
    events.write_text("populated 1\nfrozen 1\n")
    assert napping.communicate(timeout=20)[0] == "-1 4\n"
    watch.end()
    while not watch.woken:
        time.sleep(0.001)


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
