"""The lab's service: one process, one thread, one epoll; all it knows about its clients is in its memory.

Runs on a host's own Python as `python3 -m labs.programs.pattern_server`, in a container or, with
`--daemon`, as a plain process. See `pattern.py` for what it says to its clients.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from labs.programs.ballast import PAGE_BYTES, Ballast
from labs.programs.pattern import MEMORY, MEMORY_ANSWER, STREAM, ProtocolError, ServerHalf

READ_BYTES = 65536
OUTPUT_LIMIT_BYTES = 262144
"""A client that does not read gets nothing more, and is not read from, until it has taken this much."""

DIRTY_EVERY_S = 0.01
MEGABYTE = 1 << 20


class Carried(Protocol):
    """Memory that the service carries along, as `Ballast` is."""

    @property
    def pages(self) -> int:
        """How many pages it has."""

    def dirty(self, pages: int) -> None:
        """Rewrite so many pages."""

    def check_all(self) -> int:
        """Look at every page; return how many were ever found to be wrong."""


class Connection:
    """One client: its socket, what is still to be sent to it, and the conversation."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.half = ServerHalf()
        self.output = bytearray()
        self.streaming = False
        self.closed = False


class PatternServer:
    """Answers, pushes and dirties memory until it is told to end."""

    def __init__(self, listeners: Iterable[socket.socket], ballast: Carried, dirty_mb_s: float) -> None:
        self._ballast = ballast
        self._selector = selectors.DefaultSelector()
        for listener in listeners:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ)
        self._due: list[tuple[float, int, Connection]] = []
        self._order = itertools.count()  # two frames due at the same instant must not compare connections
        self._dirty_pages_per_s = dirty_mb_s * MEGABYTE / PAGE_BYTES
        self._dirtied_at = time.monotonic()

    def run(self) -> None:
        """Serve until a signal ends the process."""
        while True:
            self.turn()

    def turn(self, longest_wait_s: float | None = None) -> None:
        """Wait for something to do, and do all of it."""
        for key, events in self._selector.select(self._wait_s(longest_wait_s)):
            if key.data is None:
                assert isinstance(key.fileobj, socket.socket)
                self._accept(key.fileobj)
            else:
                self._serve(key.data, events)
        self._push_due_frames()
        self._dirty_memory()

    def close(self) -> None:
        """Close every connection and listener."""
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()

    def _wait_s(self, longest_s: float | None) -> float | None:
        waits = [longest_s] if longest_s is not None else []
        if self._dirty_pages_per_s:
            waits.append(DIRTY_EVERY_S)
        if self._due:
            waits.append(max(self._due[0][0] - time.monotonic(), 0))
        return min(waits, default=None)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(sock, selectors.EVENT_READ, Connection(sock))

    def _serve(self, connection: Connection, events: int) -> None:
        try:
            if events & selectors.EVENT_READ and len(connection.output) < OUTPUT_LIMIT_BYTES:
                data = connection.sock.recv(READ_BYTES)
                if not data:
                    self._close(connection)
                    return
                self._take(connection, data)
            self._send(connection)
        except BlockingIOError:
            return
        except (OSError, ProtocolError):
            # The client is gone, or was never one of ours; nobody else is to notice.
            self._close(connection)

    def _take(self, connection: Connection, data: bytes) -> None:
        half = connection.half
        connection.output += half.feed(data)
        if half.mode == STREAM and not connection.streaming:
            connection.streaming = True
            self._schedule(connection)
        elif half.mode == MEMORY:
            connection.output += MEMORY_ANSWER.pack(self._ballast.pages, self._ballast.check_all())

    def _send(self, connection: Connection) -> None:
        if connection.output:
            try:
                sent = connection.sock.send(connection.output)
            except BlockingIOError:
                sent = 0
            del connection.output[:sent]
        wanted = selectors.EVENT_READ if len(connection.output) < OUTPUT_LIMIT_BYTES else 0
        wanted |= selectors.EVENT_WRITE if connection.output else 0
        if self._selector.get_key(connection.sock).events != wanted:
            self._selector.modify(connection.sock, wanted, connection)

    def _close(self, connection: Connection) -> None:
        connection.closed = True
        self._selector.unregister(connection.sock)
        connection.sock.close()

    def _schedule(self, connection: Connection) -> None:
        when = time.monotonic() + connection.half.interval_s
        heapq.heappush(self._due, (when, next(self._order), connection))

    def _push_due_frames(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            connection = heapq.heappop(self._due)[2]
            if connection.closed:
                continue
            if len(connection.output) < OUTPUT_LIMIT_BYTES:
                connection.output += connection.half.next_stream_frame()
            self._schedule(connection)
            try:
                self._send(connection)
            except OSError:
                self._close(connection)

    def _dirty_memory(self) -> None:
        now = time.monotonic()
        pages = int((now - self._dirtied_at) * self._dirty_pages_per_s)
        if pages:
            # A service that was stopped does not make up for what it had not written meanwhile.
            self._ballast.dirty(min(pages, int(self._dirty_pages_per_s * DIRTY_EVERY_S * 10) + 1))
            self._dirtied_at = now


def listen(address: str, port: int) -> socket.socket:
    """A listening socket, IPv4 or IPv6 as the address says."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(512)
    return listener


def detach_stdio() -> None:
    """Put /dev/null in place of the standard streams: a file or pipe of this host is missing on the next."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    if null > 2:
        os.close(null)


def daemonize(pid_file: Path | None) -> None:
    """Become a child of PID 1 that leads a session of its own, away from its terminal and directory.

    The caller gets its prompt back when the service listens and its pid is written: there is nothing to
    wait for. CRIU dumps a tree from a session's leader down, so there is no second fork.
    """
    child = os.fork()
    if child:
        if pid_file:
            pid_file.write_text(f"{child}\n")
        os._exit(0)
    os.setsid()
    os.chdir("/")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True, action="append", help="may be given more than once")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--memory-mb", type=int, default=0, help="memory to carry along")
    parser.add_argument("--dirty-mb-s", type=float, default=0.0, help="how much of it to rewrite every second")
    parser.add_argument("--pid-file", type=Path)
    parser.add_argument("--daemon", action="store_true", help="go to the background once listening")
    return parser


def serve(options: argparse.Namespace, make_ballast: Callable[[], Carried]) -> None:
    """Be the service until a signal ends it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one descriptor a client, and there may be thousands
    if options.daemon:
        os.closerange(3, 1024)  # a descriptor inherited from whoever started us could not be moved
    ballast = make_ballast()  # first: who finds us listening finds us complete
    listeners = []
    for address in options.address:
        try:
            listeners.append(listen(address, options.port))
        except OSError as error:
            sys.exit(f"pattern_server: cannot listen on {address} port {options.port}: {error.strerror}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # PID 1 of a container has no default action
    if options.daemon:
        daemonize(options.pid_file)
    elif options.pid_file:
        options.pid_file.write_text(f"{os.getpid()}\n")
    detach_stdio()
    PatternServer(listeners, ballast, options.dirty_mb_s).run()


def main() -> None:
    options = arguments().parse_args()
    serve(options, lambda: Ballast(options.memory_mb * MEGABYTE))


if __name__ == "__main__":
    main()
