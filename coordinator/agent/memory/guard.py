"""The guard: a small process that stands between a service whose memory is still being filled in, and wrong memory.

When the last descriptor of a userfaultfd is closed, the kernel answers every further fault with a page of zeroes
(Documentation/admin-guide/mm/userfaultfd.rst). So if the filler (``filler.py``) died before all pages are in the tasks,
the service would go on, silently, with zeroes in its memory. The guard therefore traces the filler: the kernel stops a
traced process at the beginning of its end, whatever ends it, with its descriptors still open (ptrace(2),
PTRACE_EVENT_EXIT), and does not go on with it before the guard has killed the tasks.

It keeps no descriptor of the userfaultfds: with one open that nobody reads, a service that forks would wait for ever.

It is started before the freeze, runs in a session of its own with the standard library alone, and reads lines from a
socket of the agent's: ``watch FILLER_PID ROOT_PID NEEDS_AGENT``, answered by ``watching`` when it traces, and at the
end ``done``, or ``end`` to have the tasks killed. End of file without either means that the agent is gone: while pages
are fetched from the source (NEEDS_AGENT is 1) that is the end of the tasks, else the guard stays until the filler has
done its work. A filler that is gone already when it is to be watched ends it at once. The guard's own death harms
nothing as long as the filler lives.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import sys
from pathlib import Path

_PROC = Path("/proc")

#: include/uapi/linux/ptrace.h
_CONT, _SEIZE, _GETEVENTMSG, _LISTEN = 7, 0x4206, 0x4201, 0x4208
_OPTION_TRACE_EXIT, _EVENT_EXIT, _EVENT_STOP = 1 << 6, 6, 128
_STOPPING = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


def _ptrace(request: int, pid: int, data: int | None = None) -> None:
    if _libc.ptrace(request, pid, None, data) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def tree(root_pid: int) -> list[int]:
    """A process and its descendants."""
    found, queue = [], [root_pid]
    while queue:
        pid = queue.pop()
        found.append(pid)
        try:
            for children in (_PROC / str(pid) / "task").glob("*/children"):
                queue.extend(int(child) for child in children.read_text().split())
        except OSError:
            continue  # it ended meanwhile
    return found


def kill(pids: list[int]) -> None:
    """Kill what is left of the tasks at once; a task that waits for a page dies too."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


class Filler:
    """The filler, traced, and the root of the tasks that it fills."""

    def __init__(self, pid: int, root_pid: int) -> None:
        """Raises ``OSError`` if the filler is gone."""
        self._pid = pid
        self._root_pid = root_pid
        self._root = os.pidfd_open(root_pid)  # a pid may come to be another process's
        self.failed = False
        _ptrace(_SEIZE, pid, _OPTION_TRACE_EXIT)

    def kill_tasks(self, why: str) -> None:
        """Better down than wrong."""
        self.failed = True
        if select.select([self._root], [], [], 0)[0]:
            return  # it has ended
        kill(tree(self._root_pid))
        print(f"killed {self._root_pid}: its memory could not be filled in ({why})", flush=True)  # noqa: T201 - its log

    def kill(self) -> None:
        """With nobody to ask for pages, and nobody to give them to, it is of no use any more."""
        kill([self._pid])

    def attend(self) -> bool:
        """Let the filler go on from whatever it has been stopped for; ``False`` when it has ended."""
        try:
            while True:
                pid, status = os.waitpid(self._pid, os.WNOHANG)
                if not pid:
                    return True
                if not os.WIFSTOPPED(status):
                    return False
                self._go_on(os.WSTOPSIG(status), status >> 16)
        except (ChildProcessError, ProcessLookupError):
            return False  # and we have seen it end

    def _go_on(self, number: int, event: int) -> None:
        if event == _EVENT_EXIT:
            status = ctypes.c_ulong()
            if _libc.ptrace(_GETEVENTMSG, self._pid, None, ctypes.byref(status)) < 0 or status.value != 0:
                self.kill_tasks(f"the filler ended with wait status {status.value:#x}")
            _ptrace(_CONT, self._pid)
        elif event == _EVENT_STOP:
            _ptrace(_LISTEN if number in _STOPPING else _CONT, self._pid)
        else:
            _ptrace(_CONT, self._pid, number)


def follow(agent: socket.socket) -> int:
    """Follow the lines of the agent, and the filler; the exit status says whether the tasks had to be killed."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    os.set_blocking(reading, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    filler: Filler | None = None
    needs_agent, pending = True, b""
    while True:
        ready, _, _ = select.select([reading, *([agent.fileno()] if agent.fileno() >= 0 else [])], [], [])
        if reading in ready:
            os.read(reading, 4096)
            if filler is not None and not filler.attend() and agent.fileno() < 0:
                return int(filler.failed)
        if agent.fileno() not in ready:
            continue
        received = agent.recv(4096)
        *lines, pending = (pending + received).split(b"\n")
        for line in lines:
            word, *numbers = line.split()
            if word == b"done":
                return 0
            if word == b"end":
                return _end(filler, "it was given up")
            filler = Filler(int(numbers[0]), int(numbers[1]))
            needs_agent = numbers[2] == b"1"
            agent.sendall(b"watching\n")
        if not received:
            if filler is None or needs_agent:
                return _end(filler, "the agent ended")
            agent.close()
            if not filler.attend():
                return int(filler.failed)


def _end(filler: Filler | None, why: str) -> int:
    if filler is not None:
        filler.kill_tasks(why)
        filler.kill()
    return 1


def main() -> int:
    """See ``follow``."""
    with socket.socket(fileno=int(sys.argv[1])) as agent:
        try:
            return follow(agent)
        except OSError as error:  # the filler was gone when it was to be watched; or the agent, while it was answered
            print(f"cannot watch: {error}", flush=True)  # noqa: T201 - its log
            return 1
