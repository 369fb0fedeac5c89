"""The ptrace(2) requests that are needed, through ctypes, without giving up Python's global lock in between.

Requests and options: include/uapi/linux/ptrace.h. Everything here is called by one thread per target, because the
kernel knows tracers by thread; when that thread ends, the kernel lets go of whatever it still traces.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from dataclasses import dataclass

from coordinator.errors import TrackingFailed

SEIZE, INTERRUPT, CONT, SYSCALL, DETACH = 0x4206, 0x4207, 7, 24, 17
GETREGSET, SETREGSET, GETSIGMASK, SETSIGMASK, GET_RSEQ = 0x4204, 0x4205, 0x420A, 0x420B, 0x420F
NT_PRSTATUS = 1
O_TRACESYSGOOD, O_SUSPEND_SECCOMP = 1, 1 << 21
EVENT_STOP = 128
_WALL = 0x40000000

#: Signals held back while a call is injected: all that can be.
ALL_SIGNALS = (1 << 64) - 1

# PyDLL keeps the global lock: another thread of the agent that took it would lengthen the stop by milliseconds.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.waitpid.argtypes = (ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.c_int)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
)

#: Polls for a stop that follow each other at once, and those after them that still keep the global lock.
_EAGER_POLLS, _BRIEF_POLLS = 100, 300


class TargetGone(Exception):
    """The process ended, or became another one, while it was looked at. Not an error of the move."""


class Unresponsive(Exception):
    """The thread does not come to a stop: it is in an uninterruptible sleep, or frozen."""


class _IoVec(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _RseqConfiguration(ctypes.Structure):
    """struct ptrace_rseq_configuration."""

    _fields_ = (
        ("pointer", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("signature", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a traced thread stopped: a ptrace event, a system call (entry or exit), or a signal about to be delivered."""

    signal: int
    event: int

    @property
    def by_event(self) -> bool:
        """Stopped by PTRACE_INTERRUPT or by a stop of its process: nothing is being delivered."""
        return self.event == EVENT_STOP

    @property
    def at_call(self) -> bool:
        """At the entry or the exit of a system call."""
        return self.signal == signal.SIGTRAP | 0x80


def request(what: int, tid: int, address: int = 0, data: int = 0) -> int:
    """One ptrace request; raises ``TargetGone`` or an ``OSError``."""
    result = int(_libc.ptrace(what, tid, address, data))
    if result == -1:
        code = ctypes.get_errno()
        if code == errno.ESRCH:
            raise TargetGone(f"thread {tid} is gone")
        raise OSError(code, os.strerror(code))
    return result


def seize(tid: int, options: int) -> None:
    """Attach without stopping. A refusal says who or what refuses."""
    try:
        request(SEIZE, tid, 0, options)
    except OSError as error:
        if status_field(tid, "State")[:1] in ("", "Z", "X"):  # a zombie is refused like a forbidden process
            raise TargetGone(f"thread {tid} is gone") from error
        raise TrackingFailed(
            f"process {tid} cannot be traced: {_why_refused(tid, options)} ({error.strerror})"
        ) from error


def _why_refused(tid: int, options: int) -> str:
    tracer = status_field(tid, "TracerPid")
    if tracer not in ("", "0"):
        return f"it is being traced by process {tracer}"
    if options & O_SUSPEND_SECCOMP:
        return "it has a seccomp filter that cannot be suspended here (CAP_SYS_ADMIN, CONFIG_CHECKPOINT_RESTORE)"
    return "it forbids tracing (CAP_SYS_PTRACE, kernel.yama.ptrace_scope, a security module)"


def status_field(tid: int, name: str) -> str:
    """A field of /proc/TID/status, or an empty string."""
    try:
        with open(f"/proc/{tid}/status", encoding="utf-8", errors="replace") as status:  # noqa: PTH123
            for line in status:
                if line.startswith(name + ":"):
                    return line.partition(":")[2].strip()
    except (FileNotFoundError, ProcessLookupError):
        pass
    return ""


def wait_stop(tid: int, deadline_s: float) -> Stop:
    """Wait for the next stop, at most ``deadline_s``.

    Polled: waitpid(2) knows no timeout, and a thread in an uninterruptible sleep never answers. The first polls follow
    each other at once, for a stop takes some microseconds."""
    until = time.monotonic() + deadline_s
    status = ctypes.c_int()
    polls = 0
    while True:
        pid = int(_libc.waitpid(tid, ctypes.byref(status), os.WNOHANG | _WALL))
        if pid < 0:
            raise TargetGone(f"thread {tid} is gone")
        if pid:
            if os.WIFSTOPPED(status.value):
                return Stop(os.WSTOPSIG(status.value) & 0xFF, status.value >> 16)
            raise TargetGone(f"thread {tid} ended")
        polls += 1
        if polls <= _EAGER_POLLS:
            _libc.sched_yield()
        elif polls <= _BRIEF_POLLS:
            _libc.usleep(10)
        elif time.monotonic() > until:
            raise Unresponsive(f"thread {tid} does not stop within {deadline_s:g} s")
        else:
            time.sleep(0.001)


def read_memory(tid: int, address: int, length: int) -> bytes:
    """Memory of the process as it is now; empty if it cannot be read."""
    buffer = (ctypes.c_ubyte * length)()
    local, remote = _IoVec(ctypes.addressof(buffer), length), _IoVec(address, length)
    got = _libc.process_vm_readv(tid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    return bytes(buffer) if got == length else b""


def get_registers(tid: int, length: int) -> bytes:
    """The general registers; raises ``TrackingFailed`` if the thread is not of this host's machine."""
    buffer = (ctypes.c_ubyte * length)()
    vector = _IoVec(ctypes.addressof(buffer), length)
    request(GETREGSET, tid, NT_PRSTATUS, ctypes.addressof(vector))
    if vector.length != length:
        raise TrackingFailed(f"process {tid} is a 32-bit program: its memory cannot be tracked")
    return bytes(buffer)


def set_registers(tid: int, registers: bytes) -> None:
    """Set the general registers."""
    buffer = (ctypes.c_ubyte * len(registers)).from_buffer_copy(registers)
    vector = _IoVec(ctypes.addressof(buffer), len(registers))
    request(SETREGSET, tid, NT_PRSTATUS, ctypes.addressof(vector))


def get_signal_mask(tid: int) -> int:
    """The blocked signals; during a ppoll or the like, those that are blocked after it."""
    mask = ctypes.c_uint64()
    request(GETSIGMASK, tid, 8, ctypes.addressof(mask))
    return mask.value


def set_signal_mask(tid: int, blocked: int) -> None:
    """Set the blocked signals (SIGKILL and SIGSTOP stay unblocked)."""
    mask = ctypes.c_uint64(blocked)
    request(SETSIGMASK, tid, 8, ctypes.addressof(mask))


def rseq_pointer(tid: int) -> int:
    """Address of the thread's ``struct rseq`` (include/uapi/linux/rseq.h), 0 if it has none or the kernel cannot
    tell."""
    configuration = _RseqConfiguration()
    try:
        request(GET_RSEQ, tid, ctypes.sizeof(configuration), ctypes.addressof(configuration))
    except OSError:
        return 0
    return int(configuration.pointer)
