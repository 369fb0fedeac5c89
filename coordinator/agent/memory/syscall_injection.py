"""Makes system calls inside a running process, and leaves it exactly as found.

One thread of the target is stopped for some hundred microseconds, its others run on. What is kept, and how:

- *Registers and the interrupted call.* The thread is stopped by PTRACE_INTERRUPT, on its way back to user mode, in the
  kernel's signal code. Its registers (with orig_rax, which says which call was interrupted) are put back in a stop of
  the very same kind, so that the kernel decides there about restarting the call as it would have done before. Floating
  point and vector state is never touched.
- *Signals.* A signal that is being delivered when we stop the thread is delivered first; all that come later wait,
  blocked as by the thread itself, and are delivered when it goes on: none is lost, none comes twice. A process that is
  stopped (SIGSTOP) stays so: the kernel stops the thread again when we let go of it.
- *Memory.* Nothing of the process's is written. The instruction that makes the call is one it already has, usually of
  its vdso; a call that takes a pointer gets a page that is mapped and unmapped again (``page_inside``).
- *seccomp* is suspended for the calls (PTRACE_O_SUSPEND_SECCOMP).
- *rseq.* A thread inside a restartable sequence is let out of it first: its kernel-side restart would be skipped while
  it runs our instruction.

A tracer that ends, however, lets the thread go at whatever it is doing: so nothing but SIGKILL of the agent in the
very microseconds of a call can do harm. References: ptrace(2), signal(7), arch/x86/kernel/signal.c.
"""

from __future__ import annotations

import gc
import mmap
import os
import signal
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from coordinator.agent.memory import ptrace
from coordinator.agent.memory.base import PAGE_BYTES
from coordinator.agent.memory.ptrace import TargetGone, Unresponsive
from coordinator.agent.memory.registers import Machine, this_machine
from coordinator.errors import TrackingFailed

T = TypeVar("T")

#: How long a thread may take to stop, in seconds. Past that another thread is tried.
STOP_DEADLINE_S = 1.0
_TRIED_THREADS = 4
_SWITCH_INTERVAL_S = 0.00005
_RSEQ_TRIES = 50
#: States of proc(5), those to be preferred first: a sleeping thread waits in a call, and is not in the middle of
#: anything.
_STATE_ORDER = "SITtR"
_SEARCHED_BYTES = 1 << 22

# One injection at a time in this process: it changes the interpreter's switch interval for its duration.
_lock = threading.Lock()


class StoppedThread:
    """A thread of the target that is stopped, in which calls can be made. Made by ``with_stopped_thread``."""

    def __init__(self, pid: int, tid: int, machine: Machine, instruction: int) -> None:
        self.pid = pid
        self.tid = tid
        self.machine = machine
        self._instruction = instruction
        self._registers = b""
        self._mask = 0
        self._altered = False

    def call(self, number: int, *arguments: int) -> int:
        """Make a system call; return its result, negative for an errno."""
        if not self._altered:
            self._check_instruction()
            ptrace.set_signal_mask(self.tid, ptrace.ALL_SIGNALS)
        self._altered = True
        ptrace.set_registers(self.tid, self.machine.call(self._registers, self._instruction, number, arguments))
        self._go_to_call_stop()  # its entry
        self._go_to_call_stop()  # its exit
        return self.machine.result(ptrace.get_registers(self.tid, self.machine.register_bytes))

    def _check_instruction(self) -> None:
        """The instruction is where it was found, or the process has become another program meanwhile."""
        expected = self.machine.instruction
        if ptrace.read_memory(self.tid, self._instruction, len(expected)) != expected:
            raise TargetGone(f"process {self.pid} has executed another program")

    def _go_to_call_stop(self) -> None:
        forward = 0
        for _ in range(1000):
            ptrace.request(ptrace.SYSCALL, self.tid, 0, forward)
            stop = ptrace.wait_stop(self.tid, STOP_DEADLINE_S)
            forward = 0
            if stop.at_call:
                return
            if not stop.by_event:
                if stop.signal != signal.SIGSTOP:
                    break
                forward = stop.signal  # cannot be blocked; handed on it stops the others, and us at the next event
        raise TrackingFailed(f"process {self.pid}: a system call made in it was interrupted")

    def stop(self, asked: Callable[[], None] = lambda: None) -> None:
        """Bring the seized thread to a stop in which nothing is being delivered, and outside of a restartable
        sequence; ``asked`` is called, perhaps more than once, when it has been asked to stop."""
        for _ in range(_RSEQ_TRIES):
            self._interrupt(asked)
            self._registers = ptrace.get_registers(self.tid, self.machine.register_bytes)
            if self.machine.in_call(self._registers) or not self._in_restartable_sequence():
                break
            ptrace.request(ptrace.CONT, self.tid)
        else:
            raise Unresponsive(f"thread {self.tid} stays in a restartable sequence")
        self._mask = ptrace.get_signal_mask(self.tid)

    def _interrupt(self, asked: Callable[[], None]) -> None:
        """Stop at an event. A signal that is being delivered is delivered first, with the next stop asked for before,
        because a stop for a signal uses up a pending interrupt (kernel/signal.c, ptrace_stop)."""
        ptrace.request(ptrace.INTERRUPT, self.tid)
        asked()
        for _ in range(1000):
            stop = ptrace.wait_stop(self.tid, STOP_DEADLINE_S)
            if stop.by_event:
                return
            ptrace.request(ptrace.INTERRUPT, self.tid)
            ptrace.request(ptrace.CONT, self.tid, 0, 0 if stop.at_call else stop.signal)
        raise Unresponsive(f"thread {self.tid} does nothing but receive signals")

    def _in_restartable_sequence(self) -> bool:
        """Whether the thread is inside one now (include/uapi/linux/rseq.h: the third word of the registered area points
        to a descriptor with start, length and abort address)."""
        pointer = ptrace.rseq_pointer(self.tid)
        if not pointer:
            return False
        try:
            (descriptor,) = struct.unpack("=Q", ptrace.read_memory(self.tid, pointer + 8, 8))
            start, length = struct.unpack("=QQ", ptrace.read_memory(self.tid, descriptor + 8, 16))
        except struct.error:  # there is none
            return False
        inside: int = self.machine.instruction_pointer(self._registers) - start
        return 0 <= inside < int(length)

    def release(self) -> None:
        """Put everything back and let the thread go on. The last stop is an event again: see the module."""
        if self._altered:
            ptrace.request(ptrace.INTERRUPT, self.tid)
            self._resume_to_event()
        ptrace.set_registers(self.tid, self.machine.resumable(self._registers))
        if self._altered:
            ptrace.set_signal_mask(self.tid, self._mask)
        ptrace.request(ptrace.DETACH, self.tid)

    def _resume_to_event(self) -> None:
        with suppress(TargetGone):  # it runs: a call did not come to its end, and the interrupt asked for stops it
            ptrace.request(ptrace.CONT, self.tid)
        for _ in range(1000):
            stop = ptrace.wait_stop(self.tid, STOP_DEADLINE_S)
            if stop.by_event:
                return
            ptrace.request(ptrace.INTERRUPT, self.tid)
            ptrace.request(ptrace.CONT, self.tid, 0, signal.SIGSTOP if stop.signal == signal.SIGSTOP else 0)
        raise Unresponsive(f"thread {self.tid} does nothing but receive signals")


def succeeded(thread: StoppedThread, name: str, result: int) -> int:
    """The result of a call; raises ``TrackingFailed`` if it is an errno."""
    if result < 0:
        raise TrackingFailed(f"process {thread.pid}: {name} is refused in it ({os.strerror(-result)})")
    return result


@dataclass(frozen=True, slots=True)
class PageInside:
    """A page of the target's that is ours for a while."""

    address: int
    memory: int  # its /proc/PID/mem

    def read(self, at: int, size: int) -> bytes:
        """So many bytes from an offset in the page."""
        return os.pread(self.memory, size, self.address + at)

    def write(self, at: int, data: bytes) -> None:
        """Put bytes at an offset in the page."""
        os.pwrite(self.memory, data, self.address + at)


@contextmanager
def page_inside(thread: StoppedThread) -> Iterator[PageInside]:
    """A page full of zeroes for what calls take by pointer, unmapped at the end.

    Raises ``TrackingFailed`` or ``OSError``."""
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    mapped = thread.call(thread.machine.mmap, 0, PAGE_BYTES, protection, flags, -1, 0)
    address = succeeded(thread, "mmap", mapped)
    try:
        memory = os.open(f"/proc/{thread.tid}/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            yield PageInside(address, memory)
        finally:
            os.close(memory)
    finally:
        thread.call(thread.machine.munmap, address, PAGE_BYTES)


def with_stopped_thread(pid: int, work: Callable[[StoppedThread], T], *, asked: Callable[[], None] = lambda: None) -> T:
    """Stop one thread of the process, do ``work`` with it, and leave it as found. ``asked`` ends what keeps a process
    of one thread from stopping: it is called when that has been asked to, so that it does nothing in between.

    Raises ``TargetGone`` if the process ends meanwhile, ``TrackingFailed`` if it cannot be traced or does not stop."""
    machine = this_machine()
    if machine is None:
        raise TrackingFailed(f"system calls cannot be injected on {os.uname().machine}: no register layout is known")
    instruction = find_instruction(pid, machine)
    for tid in candidates(pid)[:_TRIED_THREADS]:
        try:
            return _in_own_thread(partial(_attached, pid, tid, machine, instruction, work, asked=asked))
        except Unresponsive:
            continue
        except TargetGone:
            if tid == pid or not Path(f"/proc/{pid}").exists():
                raise
    if not Path(f"/proc/{pid}").exists():
        raise TargetGone(f"process {pid} is gone")
    raise TrackingFailed(
        f"process {pid}: none of its threads comes to a stop within {STOP_DEADLINE_S:g} s",
        "It waits for a device or a file system, or its cgroup is frozen: look at `cat /proc/PID/stack` and thaw it.",
    )


def with_process_stopped(pid: int, work: Callable[[], T]) -> T:
    """Stop all threads of the process, do ``work``, and leave them as found. For what cannot be done while it runs.

    Raises ``TargetGone`` or ``TrackingFailed`` as ``with_stopped_thread``."""
    machine = this_machine()
    if machine is None:
        raise TrackingFailed(f"processes cannot be stopped on {os.uname().machine}: no register layout is known")
    try:
        return _in_own_thread(lambda: _all_attached(pid, machine, work))
    except Unresponsive as error:
        raise TrackingFailed(f"process {pid} does not come to a stop: {error}") from error


def _all_attached(pid: int, machine: Machine, work: Callable[[], T]) -> T:
    stopped: dict[int, StoppedThread] = {}
    with _undisturbed():
        try:
            while new := [tid for tid in candidates(pid) if tid not in stopped]:  # threads make threads until all stand
                for tid in new:
                    thread = StoppedThread(pid, tid, machine, 0)
                    with suppress(TargetGone):
                        ptrace.seize(tid, 0)
                        thread.stop()
                    stopped[tid] = thread
            return work()
        finally:
            for thread in stopped.values():
                with suppress(TargetGone):
                    thread.release()


def _attached(
    pid: int,
    tid: int,
    machine: Machine,
    instruction: int,
    work: Callable[[StoppedThread], T],
    *,
    asked: Callable[[], None],
) -> T:
    options = ptrace.O_TRACESYSGOOD
    if ptrace.status_field(tid, "Seccomp") not in ("", "0"):
        options |= ptrace.O_SUSPEND_SECCOMP
    with _undisturbed():
        ptrace.seize(tid, options)
        thread = StoppedThread(pid, tid, machine, instruction)
        thread.stop(asked)
        try:
            return work(thread)
        finally:
            thread.release()


def _in_own_thread(work: Callable[[], T]) -> T:
    """Run ``work`` in a thread of its own: at its end the kernel detaches whatever it still traces."""
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
            with suppress(OSError):  # of this thread only: on a busy host the target would wait for us to be scheduled
                os.setpriority(os.PRIO_PROCESS, 0, -20)
            results.append(work())
        except BaseException as error:  # handed to the caller below, of whatever kind
            failures.append(error)

    with _lock:
        thread = threading.Thread(target=run, name="livemove-ptrace", daemon=True)
        thread.start()
        thread.join()
    if failures:
        raise failures[0]
    return results[0]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No other thread of the agent and no garbage collection makes the target wait for long.

    Nothing that is done while the target stands gives up Python's global lock by itself; if another thread demands it,
    it has to give it back soon. (A long interval would be wrong: whoever got the lock in spite of it would keep it.)"""
    interval, collecting = sys.getswitchinterval(), gc.isenabled()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    gc.disable()
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        if collecting:
            gc.enable()


@contextmanager
def _memory(pid: int) -> Iterator[int]:
    """/proc/PID/mem for reading; raises ``TargetGone`` if there is none."""
    try:
        descriptor = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        raise TargetGone(f"process {pid} is gone") from None
    except PermissionError as error:
        raise TrackingFailed(f"process {pid} forbids reading its memory (CAP_SYS_PTRACE)") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def candidates(pid: int) -> list[int]:
    """The threads that could be stopped, the best first: sleeping before running, the main thread before others.

    One that is in an uninterruptible sleep comes last: it may have ended that sleep by then."""
    ranked = []
    try:
        for entry in Path(f"/proc/{pid}/task").iterdir():
            tid = int(entry.name)
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if state not in "ZX":
                order = _STATE_ORDER.find(state)
                ranked.append((order if order >= 0 else len(_STATE_ORDER), tid != pid, tid))
    except (FileNotFoundError, ProcessLookupError):
        pass
    if not ranked:
        raise TargetGone(f"process {pid} is gone")
    return [tid for _, _, tid in sorted(ranked)]


def find_instruction(pid: int, machine: Machine) -> int:
    """Address of an instruction that makes a system call, among the executable pages that the process has: of the vdso
    if it has one there, for nobody ever unmaps that."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        raise TargetGone(f"process {pid} is gone") from None
    executable = [line for line in lines if line.split()[1][2] == "x" and not line.endswith("[vsyscall]")]
    if not lines:
        raise TargetGone(f"process {pid} is gone")
    with _memory(pid) as memory:
        for line in sorted(executable, key=lambda line: not line.endswith("[vdso]")):
            start, _, end = line.split()[0].partition("-")
            address = _search(memory, int(start, 16), int(end, 16), machine.instruction, machine.alignment)
            if address is not None:
                return address
    raise TrackingFailed(f"process {pid} has no instruction that makes a system call in its executable pages")


def _search(memory: int, start: int, end: int, wanted: Sequence[int] | bytes, alignment: int) -> int | None:
    try:
        code = os.pread(memory, min(end - start, _SEARCHED_BYTES), start)
    except OSError:
        return None
    position = code.find(bytes(wanted))
    while position >= 0:
        if position % alignment == 0:
            return start + position
        position = code.find(bytes(wanted), position + 1)
    return None
