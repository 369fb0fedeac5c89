"""After a restore: a restored connection's segments have their full size again.

A socket that is connected in repair mode works out its segment size before CRIU tells it what the peer agreed to, so
from the smallest that IPv4 knows (536 bytes, RFC 9293), and does it again only when the path's MTU changes
(net/ipv4/tcp_output.c, tcp_current_mss): three times the packets for the same bytes, for as long as the connection
lasts. Setting a socket's IP options, to none as before, makes the kernel work it out as well (net/ipv4/ip_sockglue.c).

It is done to a copy of the descriptor, while the service runs. If the service closes its own meanwhile, the connection
ends when the copy is closed, some microseconds later.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import socket
from collections.abc import Iterator

from coordinator.agent.other_processes import copy_descriptor
from coordinator.agent.tasks import PROC, process_tree

#: So many descriptors are looked at (some 10 µs each) before others have their turn.
BATCH = 50

_SOCKET = re.compile(r"socket:\[\d+\]")


async def mend_segment_sizes(root_pid: int) -> None:
    """Of every TCP connection of a process tree. Raises OSError where descriptors may not be copied."""
    for pid in process_tree(root_pid):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            process = os.pidfd_open(pid)
            try:
                for number, descriptor in enumerate(_socket_descriptors(pid)):
                    if number % BATCH == BATCH - 1:
                        await asyncio.sleep(0)
                    _mend(process, descriptor)
            finally:
                os.close(process)


def _mend(process: int, descriptor: int) -> None:
    try:
        copied = copy_descriptor(process, descriptor)
    except OSError as error:
        if error.errno in (errno.EBADF, errno.ESRCH):  # closed meanwhile, or ended
            return
        raise
    with socket.socket(fileno=copied) as sock:
        if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
            with contextlib.suppress(OSError):  # not connected any more, or of another protocol
                if not sock.getsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, 40):
                    sock.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"")


def _socket_descriptors(pid: int) -> Iterator[int]:
    """The numbers of its descriptors that are sockets."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for entry in (PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if _SOCKET.fullmatch(str(entry.readlink())):
                    yield int(entry.name)
