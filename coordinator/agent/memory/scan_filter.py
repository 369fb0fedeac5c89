"""Puts a command under a seccomp filter that hands its PAGEMAP_SCAN calls to us (seccomp_unotify(2)), and nothing else.

Every other system call goes on as ever: the kernel decides once a call number, and only ioctl(2) is looked at. The
filter is inherited by what the command starts, and not by the tasks that CRIU dumps.

Who stands in such a call waits for our answer. If we are gone, the kernel answers ENOSYS: CRIU's dump fails and the
tasks are thawed, which is right, for without us nobody sends the pages that it was not to see.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import socket
import struct
import sys
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path

from coordinator.agent.memory import under_filter
from coordinator.agent.memory.hidden_pages import HiddenPages
from coordinator.agent.memory.pagemap import PAGEMAP_SCAN
from coordinator.agent.memory.scan_answer import ScanAnswerer
from coordinator.agent.memory.userfault import ioctl_number
from coordinator.agent.process import Command, Running, start

#: By machine: AUDIT_ARCH_… (include/uapi/linux/audit.h) and the number of ioctl(2).
_MACHINES = {"x86_64": (0xC000003E, 16), "aarch64": (0xC00000B7, 29)}

#: Opcodes of include/uapi/linux/bpf_common.h, and of struct seccomp_data the offsets of number, architecture and the
#: low half of the second argument (both machines are little-endian; the kernel takes an ioctl's request as 32 bits).
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER, _ARCHITECTURE, _REQUEST = 0, 4, 24
_ALLOW, _USER_NOTIF = 0x7FFF0000, 0x7FC00000
_INSTRUCTION = struct.Struct("=HBBI")

#: struct seccomp_notif and struct seccomp_notif_resp (include/uapi/linux/seccomp.h).
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")
_RESPONSE = struct.Struct("=QqiI")
_ID = struct.Struct("=Q")
_RECEIVE = ioctl_number(3, ord("!"), 0, _NOTIFICATION.size)
_SEND = ioctl_number(3, ord("!"), 1, _RESPONSE.size)
_ID_VALID = ioctl_number(1, ord("!"), 2, _ID.size)
_SET_FLAGS = ioctl_number(1, ord("!"), 4, 8)
_CONTINUE, _SYNC_WAKE_UP = 1, 1


def filter_program(machine: str) -> bytes:
    """The filter's instructions (pure): ask about ioctl(…, PAGEMAP_SCAN, …), allow the rest, as well as calls of other
    ways into the kernel (32 bit). Knows the machines that trackers know (``registers``)."""
    architecture, ioctl = _MACHINES[machine]
    return b"".join(
        _INSTRUCTION.pack(*fields)
        for fields in (
            (_LOAD, 0, 0, _ARCHITECTURE),
            (_JUMP_EQUAL, 0, 5, architecture),
            (_LOAD, 0, 0, _NUMBER),
            (_JUMP_EQUAL, 0, 3, ioctl),
            (_LOAD, 0, 0, _REQUEST),
            (_JUMP_EQUAL, 0, 1, PAGEMAP_SCAN),
            (_RETURN, 0, 0, _USER_NOTIF),
            (_RETURN, 0, 0, _ALLOW),
        )
    )


class ScanFilter:
    """The filter of one command, and the thread that answers: it ends by itself with the last process under it."""

    def __init__(self, hidden: HiddenPages) -> None:
        self._hidden = hidden
        self._thread: threading.Thread | None = None

    async def start(self, command: Command, output: Path) -> Running:
        """Start the command as ``process.start`` does, and answer its scans; to be called once.

        Where the kernel takes no filter, the command runs without one, and ``HiddenPages.refusal`` says why."""
        ours, theirs = socket.socketpair()
        launcher = str(Path(under_filter.__file__).resolve())
        program = filter_program(os.uname().machine).hex()
        under = (sys.executable, "-I", "-S", launcher, str(theirs.fileno()), program)
        with ours:
            with theirs:
                running = await start(command, output, inherit=(theirs.fileno(),), under=under)
            message, listeners, _, _ = await asyncio.to_thread(socket.recv_fds, ours, 1024, 1)
        if listeners:
            self._thread = threading.Thread(target=self._serve, args=listeners, name="scan-filter", daemon=True)
            self._thread.start()
        else:
            self._hidden.refusal = message.decode() or "the command did not start"
        return running

    def wait(self, deadline_s: float) -> bool:
        """Wait until no process is left under the filter; ``False`` on the deadline."""
        if self._thread is not None:
            self._thread.join(deadline_s)
        return self._thread is None or not self._thread.is_alive()

    def _serve(self, listener: int) -> None:
        answerer = ScanAnswerer(self._hidden)
        try:
            _answer_all(listener, answerer)
        finally:  # whatever ends this, nobody may wait for an answer any more
            os.close(listener)
            answerer.close()


def _answer_all(listener: int, answerer: ScanAnswerer) -> None:
    """Answer until nobody is left who could ask."""
    with suppress(OSError):  # Linux 6.6: who is answered goes on at once, on our processor
        fcntl.ioctl(listener, _SET_FLAGS, _SYNC_WAKE_UP)
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    while any(events & select.POLLIN for _, events in poller.poll()):
        received = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(listener, _RECEIVE, received)
        except (FileNotFoundError, InterruptedError):  # who asked was killed meanwhile; or a signal came to us
            continue
        number, scanner, _, _, _, _, descriptor, _, address, _, _, _ = _NOTIFICATION.unpack(received)
        answer = answerer.answer(scanner, descriptor, address, partial(_waits, listener, number))
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
