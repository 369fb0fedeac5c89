"""Has a CRIU that is asked to log every step log errors and warnings alone.

runc and crun ask for CRIU's debug log, in their request, and no configuration file overrules that (criu/cr-service.c,
setup_logging_from_req). It formats and writes some 35 lines for each connection, in the freeze.

``criu swrk FD`` reads one request from its end of a pair of sockets (criu/cr-service.c, cr_service_work). A script that
stands before it in the runtime's PATH tells us that it is there, waits for a line from us, and becomes CRIU (``hook``).
Meanwhile we look at the request without taking it, and if we can, put one in its place that says the same and asks for
less: through the other end, which the runtime has and the kernel copies for us (pidfd_getfd(2)). Afterwards nobody
stands between the two. Where any of that is not as we know it, CRIU gets the request as it was: that is merely slower.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import stat
import struct
import termios
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from coordinator.agent.other_processes import copy_descriptor
from coordinator.agent.protobuf import BYTES, NUMBER, as_varint, fields

#: images/rpc.proto: of criu_req the ``type`` with a dump or a restore, the ``opts``; of these ``log_level``, 2 for
#: warnings, which is CRIU's own default. Of what is sent twice the last one counts (Protocol Buffers, encoding).
_TYPE, _DUMP_OR_RESTORE, _OPTIONS = 1, (1, 2), 2
_FEWER_LINES = b"\x48\x02"
#: Requests have some hundred bytes, more with many mounts.
_MOST_BYTES = 128 * 1024

_CREDENTIALS = struct.Struct("=iII")  # struct ucred


def quieter(request: bytes) -> bytes | None:
    """The request with less to log (pure); ``None`` for one that is neither to dump nor to restore.

    Raises ``ValueError`` or ``IndexError`` for one that cannot be read."""
    wanted, instead = False, None
    for each in fields(request):
        if (each.number, each.kind) == (_TYPE, NUMBER):
            wanted = each.value in _DUMP_OR_RESTORE
        elif (each.number, each.kind) == (_OPTIONS, BYTES):
            options = request[each.content : each.end] + _FEWER_LINES
            head = request[: each.begin] + as_varint(_OPTIONS << 3 | BYTES) + as_varint(len(options))
            instead = head + options + request[each.end :]
    return instead if wanted else None


def ask_for_less(ours: socket.socket) -> bool:
    """Put a quieter request in the place of the one that waits at CRIU's end; whether that was done.

    Raises ``OSError``, ``ValueError`` or ``IndexError`` where it cannot be replaced; then it still waits there."""
    request, _, flags, _ = ours.recvmsg(_MOST_BYTES, 0, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    instead = quieter(request)
    if instead is None or flags & socket.MSG_TRUNC:
        return False
    pid, _, _ = _CREDENTIALS.unpack(ours.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    with _other_end(pid) as theirs:
        theirs.send(instead, socket.MSG_DONTWAIT)
    ours.recv(_MOST_BYTES)  # the first of the two
    return True


class Requests:
    """Attends to the scripts that stand before CRIU, for as long as it is open: then they wait for nobody."""

    def __init__(self, door: Path) -> None:
        """``door``: where a script reads a line. If we are gone, there is an end of file to read, or nothing there."""
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC)
        self._waiting: dict[int, socket.socket] = {}
        self._door = door
        door.symlink_to(f"/proc/{os.getpid()}/fd/{self._reader}")

    def arrived(self, pid: int, descriptor: int) -> None:
        """A script is there, CRIU's end is this descriptor of it: let it go on as soon as the request is replaced."""
        try:
            process = os.pidfd_open(pid)
            try:
                ours = _copy(process, descriptor)
            finally:
                os.close(process)
        except OSError:
            self._go_on()
            return
        self._waiting[ours.fileno()] = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._asked, ours.fileno())

    def close(self) -> None:
        """Idempotent."""
        self._door.unlink(missing_ok=True)
        for number in tuple(self._waiting):
            self._leave(number)
        for descriptor in (self._reader, self._writer):
            if descriptor >= 0:
                os.close(descriptor)
        self._reader = self._writer = -1

    def _asked(self, number: int) -> None:
        with suppress(OSError, ValueError, IndexError):
            ask_for_less(self._waiting[number])
        self._leave(number)
        self._go_on()

    def _leave(self, number: int) -> None:
        asyncio.get_running_loop().remove_reader(number)
        self._waiting.pop(number).close()

    def _go_on(self) -> None:
        os.write(self._writer, b"\n")


def _other_end(pid: int) -> socket.socket:
    """The socket of a process from which somebody has not read everything yet: there must be one of the kind."""
    process = os.pidfd_open(pid)
    with ExitStack() as unwanted:
        unwanted.callback(os.close, process)
        found = {}
        for candidate in _packet_sockets(pid, process):
            unwanted.callback(candidate.close)
            if _unread(candidate):
                found[os.fstat(candidate.fileno()).st_ino] = candidate
        if len(found) != 1:
            raise OSError(f"{len(found)} sockets of process {pid} may be the other end")
        return found.popitem()[1].dup()


def _packet_sockets(pid: int, process: int) -> Iterator[socket.socket]:
    with os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            with suppress(OSError):  # closed meanwhile
                if stat.S_ISSOCK(entry.stat().st_mode):
                    candidate = _copy(process, int(entry.name))
                    if (candidate.family, candidate.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET):
                        yield candidate
                    else:
                        candidate.close()


def _copy(process: int, descriptor: int) -> socket.socket:
    """A socket of another process, for us too. Raises ``OSError``, also where it is none."""
    copied = copy_descriptor(process, descriptor)
    try:
        return socket.socket(fileno=copied)
    except OSError:
        os.close(copied)
        raise


def _unread(candidate: socket.socket) -> bool:
    """Whether there is something that the other side has not read yet (unix(7), SIOCOUTQ)."""
    (unread,) = struct.unpack("=i", fcntl.ioctl(candidate, termios.TIOCOUTQ, bytes(4)))
    return bool(unread)
