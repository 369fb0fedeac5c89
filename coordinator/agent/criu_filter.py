"""Puts CRIU under a seccomp filter that keeps it from doing in the freeze what we have done, or do sooner.

- Its PAGEMAP_SCAN calls are handed to us (seccomp_unotify(2)), so that it does not see the pages that we send
  (``memory/hidden_pages``); and so is its question where a file has data (lseek(2), SEEK_DATA), for shared memory.
- Its questions whether an entry of an epoll is what its number says are answered in the kernel with yes, if we have
  seen that all of them are (``epolls``), since all tasks stood still or else while CRIU is held.

A process under a filter can neither suspend other processes' filters nor read them (kernel/ptrace.c,
check_ptrace_options; kernel/seccomp.c, seccomp_get_filter), and CRIU does both to every container that has one. So it
gets ours when it has done that: it is held in the moment in which it opens an image of the root, the first task it
dumps (criu/cr-dump.c, cr_dump_tasks, dump_one_task), and makes the call by injection, as a task makes its userfaultfd.
That is the page map, which comes directly before the first page (criu/page-xfer.c, open_page_local_xfer), or, for the
epolls' sake, that of its ids, which comes directly before its files; or before both that of a shared object, which is
dumped while the mappings are gathered. (An image is opened when something is written to it: criu/image.c,
open_image_at.)

In that moment all tasks are frozen, and CRIU has touched nothing of theirs: whoever has to know how things are then
(``at_freeze``) is called first.

From then on who asks us waits for our answer. Every other call goes on as ever: the kernel decides once a call number,
and only of two of them the arguments are looked at. If we are gone, the kernel answers a scan with ENOSYS: CRIU's dump
fails and the tasks are thawed, which is right, for without us nobody sends the pages that it was not to see. What fails
before that leaves a dump that sees all, and takes longer.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from coordinator.agent.epolls import KCMP_EPOLL_TFD, Epolls
from coordinator.agent.memory.held_open import HeldOpen
from coordinator.agent.memory.hidden_pages import HiddenPages
from coordinator.agent.memory.pagemap import PAGEMAP_SCAN
from coordinator.agent.memory.scan_answer import ScanAnswerer
from coordinator.agent.memory.syscall_injection import StoppedThread, page_inside, succeeded, with_stopped_thread
from coordinator.agent.memory.tree import inner_pid
from coordinator.agent.memory.userfault import ioctl_number, take_out
from coordinator.agent.other_processes import KCMP
from coordinator.agent.tasks import process_tree
from coordinator.errors import LivemoveError, TrackingFailed


@dataclass(frozen=True, slots=True)
class _Numbers:
    """AUDIT_ARCH_… (include/uapi/linux/audit.h) and the numbers of system calls."""

    architecture: int
    ioctl: int
    lseek: int
    seccomp: int


_MACHINES = {
    "x86_64": _Numbers(0xC000003E, 16, 8, 317),
    "aarch64": _Numbers(0xC00000B7, 29, 62, 277),
}

#: Opcodes of include/uapi/linux/bpf_common.h, and of struct seccomp_data the offsets of number, architecture and the
#: low halves of the second and third argument (both machines are little-endian; the kernel takes an ioctl's request and
#: what kcmp compares as 32 bits).
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER, _ARCHITECTURE, _SECOND, _THIRD = 0, 4, 24, 32
#: The last is SECCOMP_RET_ERRNO with no error: the call is not made, and returns 0, which is kcmp's "the same".
_ALLOW, _USER_NOTIF, _RETURN_0 = 0x7FFF0000, 0x7FC00000, 0x00050000
_INSTRUCTION = struct.Struct("=HBBI")
_PROGRAM = struct.Struct("=HxxxxxxQ")  # struct sock_fprog

#: include/uapi/linux/seccomp.h. With the last flag a signal does not interrupt a call that is being answered.
_SET_MODE_FILTER, _NEW_LISTENER, _WAIT_KILLABLE_RECV = 1, 1 << 3, 1 << 5
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif
_RESPONSE = struct.Struct("=QqiI")  # struct seccomp_notif_resp
_ID = struct.Struct("=Q")
_RECEIVE = ioctl_number(3, ord("!"), 0, _NOTIFICATION.size)
_SEND = ioctl_number(3, ord("!"), 1, _RESPONSE.size)
_ID_VALID = ioctl_number(1, ord("!"), 2, _ID.size)
_SET_FLAGS = ioctl_number(1, ord("!"), 4, 8)
_CONTINUE, _SYNC_WAKE_UP = 1, 1


def filter_program(machine: str, *, scans: bool = True, seeks: bool = False, epolls: bool = False) -> bytes:
    """The filter's instructions (pure): ask about ioctl(…, PAGEMAP_SCAN, …) and lseek(…, SEEK_DATA), say yes to
    kcmp(…, KCMP_EPOLL_TFD, …), and allow the rest, as well as calls of other ways into the kernel (32 bit). Knows the
    machines that trackers know (``registers``)."""
    numbers = _MACHINES[machine]
    rules = [(numbers.ioctl, _SECOND, PAGEMAP_SCAN, _USER_NOTIF)] if scans else []
    rules += [(numbers.lseek, _THIRD, os.SEEK_DATA, _USER_NOTIF)] if seeks else []
    rules += [(KCMP[machine], _THIRD, KCMP_EPOLL_TFD, _RETURN_0)] if epolls else []
    code = [(_LOAD, 0, 0, _ARCHITECTURE), (_JUMP_EQUAL, 0, 1 + 4 * len(rules), numbers.architecture)]
    code.append((_LOAD, 0, 0, _NUMBER))
    for left, (number, argument, value, verdict) in zip(reversed(range(len(rules))), rules, strict=True):
        code += [
            (_JUMP_EQUAL, 0, 3, number),
            (_LOAD, 0, 0, argument),
            (_JUMP_EQUAL, 0, 1 + 4 * left, value),
            (_RETURN, 0, 0, verdict),
        ]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(_INSTRUCTION.pack(*fields) for fields in code)


def put_under_filter(pid: int, program: bytes, asked: Callable[[], None] = lambda: None) -> int:
    """Put a process of one thread, and all it will start, under the filter; return the listener.

    ``asked`` as for ``with_stopped_thread``. Raises ``TargetGone``, or ``TrackingFailed`` with the reason."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        raise TrackingFailed(f"process {pid} is gone") from None
    try:
        return with_stopped_thread(pid, lambda thread: _install(thread, process, program), asked=asked)
    finally:
        os.close(process)


def _install(thread: StoppedThread, process: int, program: bytes) -> int:
    """The program has to lie in the process's memory."""
    with page_inside(thread) as page:
        page.write(0, _PROGRAM.pack(len(program) // _INSTRUCTION.size, page.address + _PROGRAM.size) + program)
        options = _NEW_LISTENER | _WAIT_KILLABLE_RECV
        listener = thread.call(_MACHINES[os.uname().machine].seccomp, _SET_MODE_FILTER, options, page.address)
        return take_out(thread, process, succeeded(thread, "seccomp", listener))


class CriuFilter:
    """The filter of one dump, and the thread that arms it and answers. The thread ends with the last process under the
    filter, or soon after ``close``."""

    def __init__(
        self,
        root_pid: int,
        hidden: HiddenPages | None,
        images: Path,
        at_freeze: Callable[[], None] | None = None,
    ) -> None:
        """``images``: where CRIU will write them; ``hidden``: ``None`` if it is to see every page. ``at_freeze`` is
        called in a thread, or not at all; it raises nothing."""
        self._hidden = hidden
        self._epolls: Epolls | None = None
        self._root_pid = root_pid
        self._images = images
        self._at_freeze = at_freeze
        self._open: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def look(self) -> None:
        """See, while the tasks run, whether to answer for their epolls: some milliseconds for thousands of files."""
        epolls = Epolls(self._root_pid)
        self._epolls = epolls if epolls.pays() else None

    @property
    def at_stillness(self) -> Callable[[], None] | None:
        """To be called, in a thread, as soon as all tasks stand still until the dump's end, which is before CRIU is
        held: then less is left to be done while it is. ``None``: need not be."""
        return self._epolls.look if self._epolls is not None else None

    def arm(self, command: int) -> None:
        """Wait, in a thread, for CRIU to come to the root: a descendant of the process ``command``, or itself.

        With nothing to hide, no epolls to answer for and nobody to be called nothing is done at all."""
        if self._hidden is None and self._epolls is None and self._at_freeze is None:
            return
        kind = "pagemap" if self._epolls is None else "ids"
        names = [f"{kind}-{inner_pid(self._root_pid)}.img"]
        if self._hidden is not None:
            names += [f"pagemap-shmem-{inode}.img" for inode in self._hidden.may_hide]
        try:
            held = HeldOpen(*(self._images / name for name in names))
        except OSError as error:
            self._refused(str(error))
            return
        self._open, until = socket.socketpair()
        self._thread = threading.Thread(target=self._run, args=(held, command, until), name="criu-filter", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread without waiting for it; who would ask it later fails. Idempotent."""
        if self._open is not None:
            self._open.close()

    def wait(self, deadline_s: float) -> bool:
        """Wait until the thread has ended; ``False`` on the deadline."""
        if self._thread is not None:
            self._thread.join(deadline_s)
        return self._thread is None or not self._thread.is_alive()

    def _run(self, held: HeldOpen, command: int, until: socket.socket) -> None:
        hidden = self._hidden
        with until, closing(held):
            criu = held.wait(until.fileno(), lambda pid: pid in process_tree(command))
            if criu is None:
                self._refused("CRIU did not come to the images of the root")
                return
            if self._at_freeze is not None:
                self._at_freeze()
            try:
                settled = self._epolls is not None and self._epolls.as_numbered()
                if hidden is None and not settled:
                    held.let_in()  # closing takes longer
                    return
                program = self._program(epolls=settled)
                listener = put_under_filter(criu, program, held.let_in)
            except (OSError, LivemoveError) as error:
                self._refused(str(error))
                return
            try:
                if hidden is not None:
                    with closing(ScanAnswerer(hidden)) as answerer:
                        _answer_all(listener, until.fileno(), answerer)
            finally:  # whatever ends this, nobody may wait for an answer any more
                os.close(listener)

    def _program(self, *, epolls: bool) -> bytes:
        hidden = self._hidden
        scans, seeks = (hidden.private, bool(hidden.may_hide)) if hidden is not None else (False, False)
        return filter_program(os.uname().machine, scans=scans, seeks=seeks, epolls=epolls)

    def _refused(self, why: str) -> None:
        if self._hidden is not None:
            self._hidden.refusal = why


def _answer_all(listener: int, until: int, answerer: ScanAnswerer) -> None:
    """Answer until nobody is left who could ask, or the descriptor ``until`` is readable."""
    with suppress(OSError):  # Linux 6.6: who is answered goes on at once, on our processor
        fcntl.ioctl(listener, _SET_FLAGS, _SYNC_WAKE_UP)
    seek = _MACHINES[os.uname().machine].lseek
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    poller.register(until, select.POLLIN)
    while poller.poll() == [(listener, select.POLLIN)]:
        received = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(listener, _RECEIVE, received)
        except (FileNotFoundError, InterruptedError):  # who asked was killed meanwhile; or a signal came to us
            continue
        number, asker, _, call, _, _, descriptor, _, address, _, _, _ = _NOTIFICATION.unpack(received)
        waits = partial(_waits, listener, number)
        if call == seek:
            hidden = answerer.is_hidden(asker, descriptor, waits)
            response = (number, 0, -errno.ENXIO, 0) if hidden else (number, 0, 0, _CONTINUE)
        else:
            answer = answerer.answer(asker, descriptor, address, waits)
            response = (number, 0, 0, _CONTINUE) if answer is None else (number, answer, 0, 0)
        with suppress(FileNotFoundError):  # killed meanwhile
            fcntl.ioctl(listener, _SEND, _RESPONSE.pack(*response))


def _waits(listener: int, number: int) -> bool:
    """Whether the call is still being made (SECCOMP_IOCTL_NOTIF_ID_VALID)."""
    try:
        fcntl.ioctl(listener, _ID_VALID, _ID.pack(number))
    except FileNotFoundError:
        return False
    return True
