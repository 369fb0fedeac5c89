"""Puts a descriptor of ours into another process, under a number that it has in use: with system calls made inside.

The kernel lets a process take descriptors of others (pidfd_getfd(2)), not give them. So the process makes a pair of
sockets, of which we take one end, and receives the descriptor through the other (unix(7), SCM_RIGHTS). What
``syscall_injection`` says of leaving it as found is true here, too; all it makes on the way is closed again.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from coordinator.agent.memory import ptrace
from coordinator.agent.memory.ptrace import status_field
from coordinator.agent.memory.syscall_injection import StoppedThread, page_inside, succeeded, with_stopped_thread
from coordinator.agent.other_processes import copy_descriptor
from coordinator.errors import TrackingFailed

_WALL = 0x40000000  # include/uapi/linux/wait.h


def put_in_place(pid: int, number: int, ours: int, asked: Callable[[], None]) -> None:
    """Make a descriptor of ours that of a process of one thread, under a number that it has in use already.

    ``asked`` as for ``with_stopped_thread``. Raises ``LivemoveError`` or ``OSError``; the number is as it was then."""
    process = os.pidfd_open(pid)
    try:
        with let_go_by_tracer(pid, asked):
            with_stopped_thread(pid, lambda thread: _put_inside(thread, process, number, ours), asked=asked)
    finally:
        os.close(process)


@contextmanager
def let_go_by_tracer(pid: int, asked: Callable[[], None]) -> Iterator[None]:
    """Have the process that traces another let go of it, and trace it again at the end; meanwhile it stands still.

    A process has one tracer, and that of the first task is CRIU, where a runtime wants the task as its own child
    (criu/cr-restore.c, restore_root_task): it was seized without options, and runs. ``asked``: as above."""
    tracer = int(status_field(pid, "TracerPid") or "0")
    if not tracer:
        yield
        return
    calls = _MACHINES[os.uname().machine]

    def let_go(thread: StoppedThread) -> None:
        succeeded(thread, "ptrace", thread.call(calls.ptrace, ptrace.INTERRUPT, pid, 0, 0))
        asked()
        succeeded(thread, "wait4", thread.call(calls.wait4, pid, 0, _WALL, 0))
        os.kill(pid, signal.SIGSTOP)  # it stops again before it does anything
        succeeded(thread, "ptrace", thread.call(calls.ptrace, ptrace.DETACH, pid, 0, 0))

    def seize(thread: StoppedThread) -> None:
        succeeded(thread, "ptrace", thread.call(calls.ptrace, ptrace.SEIZE, pid, 0, 0))

    with_stopped_thread(tracer, let_go)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)  # first: one that is seized would stop once more
        with_stopped_thread(tracer, seize)


@dataclass(frozen=True, slots=True)
class _Calls:
    """Numbers of system calls."""

    socketpair: int
    recvmsg: int
    dup3: int
    ptrace: int
    wait4: int


_MACHINES = {"x86_64": _Calls(53, 47, 292, 101, 61), "aarch64": _Calls(199, 212, 24, 117, 260)}
#: struct msghdr (include/linux/socket.h, user_msghdr), struct iovec, struct cmsghdr with one descriptor; and where they
#: lie in a page of the target's.
_MESSAGE, _VECTOR, _CONTROL = struct.Struct("=QIxxxxQQQQixxxx"), struct.Struct("=QQ"), struct.Struct("=QiiiI")
_PAIR_AT, _MESSAGE_AT, _VECTOR_AT, _BYTE_AT, _CONTROL_AT = 0, 64, 128, 192, 256
_PAIR = struct.Struct("=ii")


def _put_inside(thread: StoppedThread, process: int, number: int, ours: int) -> None:
    """A pair of sockets is made inside; one end is copied out, and the descriptor sent through it (unix(7))."""
    calls = _MACHINES[os.uname().machine]

    def call(name: str, *arguments: int) -> int:
        return succeeded(thread, name, thread.call(getattr(calls, name), *arguments))

    made: list[int] = []
    with page_inside(thread) as page:
        at = page.address
        try:
            call("socketpair", socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, 0, at + _PAIR_AT)
            made += _PAIR.unpack(page.read(_PAIR_AT, _PAIR.size))
            with socket.socket(fileno=copy_descriptor(process, made[0])) as end:
                socket.send_fds(end, [b"x"], [ours])
            page.write(_MESSAGE_AT, _MESSAGE.pack(0, 0, at + _VECTOR_AT, 1, at + _CONTROL_AT, _CONTROL.size, 0))
            page.write(_VECTOR_AT, _VECTOR.pack(at + _BYTE_AT, 1))
            call("recvmsg", made[1], at + _MESSAGE_AT, socket.MSG_CMSG_CLOEXEC)
            _, _, kind, received, _ = _CONTROL.unpack(page.read(_CONTROL_AT, _CONTROL.size))
            if kind != socket.SCM_RIGHTS:
                raise TrackingFailed(f"process {thread.pid} received no descriptor")
            made.append(received)
            call("dup3", received, number, 0)
        finally:
            for each in made:
                thread.call(thread.machine.close, each)
