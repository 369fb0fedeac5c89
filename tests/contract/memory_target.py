"""A process to be tracked, which does what a test tells it, and a keeper of pages that checks itself against it."""

from __future__ import annotations

import ast
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from coordinator.agent.memory.base import PAGE_BYTES, Changes, Mapping, Tracker
from coordinator.agent.memory.choose import choose_tracker
from coordinator.agent.memory.mappings import read_mappings
from coordinator.agent.memory.pages import read_pages

CHOICE = choose_tracker()

PROGRAM = """
import ctypes, mmap, os, select, signal, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
PRIVATE, SHARED, FIXED, ANON, PAGE = 2, 1, 16, 32, mmap.PAGESIZE
def area(pages, flags=PRIVATE | ANON, fd=-1, at=None, protection=3):
    got = libc.mmap(at, pages * PAGE, protection, flags, fd, 0)
    if got == (1 << 64) - 1:
        raise OSError(ctypes.get_errno(), "mmap")
    return got
def put(address, value, pages=1):
    for page in range(pages):
        libc.memset(address + page * PAGE, value, 64)
def obey():
    while line := sys.stdin.readline():
        try:
            answer = eval(line, globals())
        except SyntaxError:
            answer = exec(line, globals())
        print(repr(answer), flush=True)
obey()
"""


class Target:
    """A Python process that evaluates what it is told."""

    def __init__(self, program: str = PROGRAM) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.pid = self.process.pid
        self.children: list[int] = []
        self.run("0")

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [*self.children, self.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()

    def send(self, code: str) -> None:
        """Tell it something, and do not wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(code + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """The answer to what was told."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 60)
        assert ready, "the target does not answer"
        line = self.process.stdout.readline()
        assert line, "the target has ended"
        return ast.literal_eval(line)

    def run(self, code: str) -> Any:
        """Tell it something and return its answer."""
        self.send(code)
        return self.answer()

    def fork(self, then: str = "pass") -> int:
        """Have it fork a child that does something, and then waits for ever."""
        program = f"""
def child():
    pid = os.fork()
    if pid:
        return pid
    {then}
    while True:
        signal.pause()
"""
        self.run(f"exec({program!r}, globals())")
        self.children.append(self.run("child()"))
        return self.children[-1]


def make_tracker(pid: int) -> Tracker:
    """A tracker of the kind that this kernel offers. Where it offers none, whoever needs one is skipped."""
    assert CHOICE.make is not None
    return CHOICE.make(pid)


def until(condition: Callable[[], object]) -> None:
    """Wait for a condition, within a bound that is no part of any test's meaning."""
    for _ in range(60_000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("a condition did not come true")


def in_call(pid: int, number: int) -> bool:
    """Whether the main thread sleeps in that system call, or in its restart (restart_syscall)."""
    return Path(f"/proc/{pid}/syscall").read_text().split()[0] in (str(number), "219" if number else "")


def state(pid: int) -> str:
    """State letter of a process (proc(5))."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def names(directory: str) -> list[str]:
    """What a directory of /proc lists now."""
    return sorted(entry.name for entry in Path(directory).iterdir())


def memory_of(pid: int, start: int, length: int) -> bytes:
    """Memory as /proc/PID/mem has it."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:  # noqa: PTH123
        return os.pread(memory.fileno(), length, start)


class Keeper:
    """Keeps the pages of one process as the page store of a destination would."""

    def __init__(self) -> None:
        self.pages: dict[int, bytes] = {}

    def apply(self, pid: int, changes: Changes) -> None:
        """Forget what was dropped, fetch what is dirty."""
        assert not addresses(changes.dirty) & addresses(changes.dropped)
        for address in addresses(changes.dropped):
            self.pages.pop(address, None)
        for batch in read_pages(pid, changes.dirty):
            for address in addresses(batch.vanished):
                self.pages.pop(address, None)
            for run, data in batch:
                for page in range(run.pages):
                    offset = page * PAGE_BYTES
                    self.pages[run.start + offset] = bytes(data[offset : offset + PAGE_BYTES])

    def wrong_bytes(self, pid: int, chosen: Callable[[Mapping], bool] = lambda mapping: mapping.lazy) -> int:
        """How many bytes of the chosen mappings of a stopped process differ from what is kept."""
        wrong = 0
        zero = bytes(PAGE_BYTES)
        for mapping in read_mappings(pid):
            if not chosen(mapping) or mapping.permissions[0] != "r":
                continue
            for address in range(mapping.start, mapping.end, PAGE_BYTES):
                found, kept = memory_of(pid, address, PAGE_BYTES), self.pages.get(address, zero)
                if found != kept:
                    wrong += sum(left != right for left, right in zip(found, kept, strict=True))
        return wrong


def addresses(runs: Iterable[Any]) -> set[int]:
    """Addresses of all pages of some runs."""
    return {run.start + page * PAGE_BYTES for run in runs for page in range(run.pages)}


def pages(start: int, *numbers: int) -> set[int]:
    """Addresses of some pages of an area."""
    return {start + number * PAGE_BYTES for number in numbers}


def within(runs: Iterable[Any], start: int, count: int) -> set[int]:
    """Which pages of an area some runs name."""
    return addresses(runs) & pages(start, *range(count))
