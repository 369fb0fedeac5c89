"""A client with a stopwatch: it asks at a steady pace, checks every byte, and keeps the time of every answer.

Runs in the clients machine as `python3 -m labs.clients.asker`, one thread, standard library only. Asks go round over
all connections, one every `--interval-ms`, however many connections there are: thousands cost no more than one. A
connection is passed over while it waits for `--at-once` answers; with the default of 1 it asks as a client of a
request-and-response protocol does. With
`--connect-every-ms` it also opens a new connection that often, has it answer one question, and closes it.

It takes one word a line on standard input and answers each with one JSON object a line:

- `begin`: from now on keep times.
- `end`: pause, let what was asked be answered, and tell: `asked` and `answered` (pairs of times, in CLOCK_MONOTONIC
  seconds, in the order of the answers), `began`, and counts since `begin`.
- `round`: ask every connection once and wait for all answers.
- `stop`: end.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import resource
import selectors
import socket
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

from labs.clients.load import retransmissions_of, send_output
from labs.programs.pattern import ASK, ClientHalf

READ_BYTES = 65536
CONNECT_TIMEOUT_S = 10.0
ROUND_BURST = 64
"""A round has so many questions under way at once: the service is to be checked, not to be flooded."""


@dataclass
class Seen:
    """What was seen since `begin`."""

    began: float = 0.0
    asked: list[float] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)
    connections: int = 0
    lost: int = 0
    wrong_bytes: int = 0
    retransmissions: int = 0
    connects: int = 0
    refused: int = 0
    connect_retransmissions: int = 0
    slowest_connect_ms: float = 0.0
    troubles: list[str] = field(default_factory=list)


class Connection:
    """One connection: those that stay, and those that ask once."""

    def __init__(self, sock: socket.socket, began: float, *, once: bool) -> None:
        self.sock = sock
        self.began = began
        self.once = once
        self.connected = not once
        self.half = ClientHalf(ASK, os.urandom(16), 0)
        self.output = bytearray(self.half.hello())
        self.asked: deque[float] = deque()
        self.alive = True
        self.retransmissions = 0

    def ask(self, now: float) -> None:
        self.output += self.half.record()
        self.asked.append(now)


class Asker:
    """All connections and the one loop that drives them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._where = (options.address, options.port)
        self._interval_s = options.interval_ms / 1000
        self._connect_every_s = options.connect_every_ms / 1000
        self._patience_s = options.patience_s
        self._at_once = options.at_once
        self._selector = selectors.DefaultSelector()
        self._brief: set[Connection] = set()
        self._paused = False
        self._seen = Seen()
        self.connections = [self._connect() for _ in range(options.connections)]
        self._turn_of = 0
        self._next_ask = self._next_connect = time.monotonic()

    def _connect(self) -> Connection:
        sock = socket.create_connection(self._where, timeout=CONNECT_TIMEOUT_S)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(sock, time.monotonic(), once=False)
        self._selector.register(sock, selectors.EVENT_READ, connection)
        return connection

    # The loop

    def turn(self, longest_wait_s: float = 0.5) -> None:
        """Wait for something to do, and do all of it."""
        due = [] if self._paused else [self._next_ask, *([self._next_connect] if self._connect_every_s else [])]
        now = time.monotonic()
        wait_s = min([longest_wait_s, *(max(when - now, 0) for when in due)])
        for key, events in self._selector.select(wait_s):
            if key.data is not None and key.data.alive:
                self._serve(key.data, events)
        if not self._paused:
            self._ask_next()
        for connection in [one for one in self._brief if time.monotonic() - one.began > self._patience_s]:
            self._fail(connection, f"not done after {self._patience_s:g} s")

    def _ask_next(self) -> None:
        now = time.monotonic()
        if self._next_ask <= now:
            # Steady, but without a burst for turns that were missed.
            self._next_ask = max(self._next_ask + self._interval_s, now)
            self._turn_of = (self._turn_of + 1) % len(self.connections)
            connection = self.connections[self._turn_of]
            if connection.alive and len(connection.asked) < self._at_once:
                connection.ask(now)
                self._serve(connection, selectors.EVENT_WRITE)
        if self._connect_every_s and self._next_connect <= now:
            self._next_connect = max(self._next_connect + self._connect_every_s, now)
            self._open_brief(now)

    def _open_brief(self, now: float) -> None:
        family = socket.AF_INET6 if ":" in self._where[0] else socket.AF_INET
        connection = Connection(socket.socket(family, socket.SOCK_STREAM), now, once=True)
        connection.sock.setblocking(False)
        self._brief.add(connection)
        self._seen.connects += 1
        self._selector.register(connection.sock, selectors.EVENT_WRITE, connection)
        code = connection.sock.connect_ex(self._where)
        if code not in (0, errno.EINPROGRESS):
            self._fail(connection, os.strerror(code))

    def _serve(self, connection: Connection, events: int) -> None:
        try:
            if not connection.connected:
                self._connected(connection)
            if events & selectors.EVENT_READ:
                self._receive(connection)
            if connection.alive and connection.output:
                send_output(self._selector, connection.sock, connection.output)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(connection, str(error))

    def _connected(self, connection: Connection) -> None:
        code = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        now = time.monotonic()
        connection.connected = True
        self._seen.slowest_connect_ms = max(self._seen.slowest_connect_ms, round((now - connection.began) * 1000, 3))
        connection.ask(now)

    def _receive(self, connection: Connection) -> None:
        data = connection.sock.recv(READ_BYTES)
        now = time.monotonic()
        if not data:
            self._fail(connection, "closed by the other side")
            return
        before = connection.half.frames
        wrong = connection.half.check(data)
        for _ in range(connection.half.frames - before):
            asked = connection.asked.popleft() if connection.asked else now
            if not connection.once:
                self._seen.asked.append(asked)
                self._seen.answered.append(now)
        if wrong:
            self._seen.wrong_bytes += wrong
            self._fail(connection, f"{wrong} wrong bytes in answer {connection.half.frames}")
        elif connection.once and connection.half.frames:
            self._close(connection)

    def _fail(self, connection: Connection, why: str) -> None:
        if connection.once:
            self._seen.refused += 1
        else:
            self._seen.lost += 1
        self._seen.troubles.append(f"{'new ' if connection.once else ''}connection: {why}")
        self._close(connection)

    def _close(self, connection: Connection) -> None:
        connection.retransmissions = retransmissions_of(connection.sock)
        if connection.once:
            self._brief.discard(connection)
            self._seen.connect_retransmissions += connection.retransmissions
        connection.alive = False
        connection.asked.clear()
        self._selector.unregister(connection.sock)
        connection.sock.close()

    # The words

    def watch_input(self, descriptor: int) -> None:
        """Make `turn` return when there is something to read from `descriptor`."""
        self._selector.register(descriptor, selectors.EVENT_READ, None)

    def begin(self) -> dict[str, Any]:
        self._seen = Seen(time.monotonic(), connections=sum(one.alive for one in self.connections))
        self._seen.retransmissions = -self._retransmissions()
        return {"began": self._seen.began}

    def end(self) -> dict[str, Any]:
        """What was seen since `begin`, after everything that was asked is answered or lost."""
        self._paused = True
        silent = self._wait_for(self.connections)
        self._wait_for(list(self._brief))
        for connection in silent:
            self._fail(connection, f"no answer for {self._patience_s:g} s")
        self._paused = False
        self._next_ask = self._next_connect = time.monotonic()
        self._seen.retransmissions += self._retransmissions()
        return asdict(self._seen)

    def round(self) -> dict[str, Any]:
        """Ask every connection that is alive once, and wait for the answers."""
        self._paused = True
        alive = [one for one in self.connections if one.alive]
        wrong, silent = self._seen.wrong_bytes, 0
        for start in range(0, len(alive), ROUND_BURST):
            burst = alive[start : start + ROUND_BURST]
            for connection in burst:
                connection.ask(time.monotonic())
                self._serve(connection, selectors.EVENT_WRITE)
            silent += len(self._wait_for(burst))
        self._paused = False
        answered = sum(one.alive for one in alive) - silent
        return {
            "connections": len(self.connections),
            "answered": answered,
            "wrong_bytes": self._seen.wrong_bytes - wrong,
            "troubles": self._seen.troubles[:8],
        }

    def _wait_for(self, connections: list[Connection]) -> list[Connection]:
        """Those that have not answered everything within the patience we have."""
        deadline = time.monotonic() + self._patience_s
        waiting = connections
        while waiting := [one for one in waiting if one.alive and (one.asked or not one.connected)]:
            if time.monotonic() > deadline:
                break
            self.turn(0.05)
        return waiting

    def _retransmissions(self) -> int:
        for connection in self.connections:
            if connection.alive:
                connection.retransmissions = retransmissions_of(connection.sock)
        return sum(one.retransmissions for one in self.connections)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="asker", description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--interval-ms", type=float, default=2.0, help="between two questions, over all connections")
    parser.add_argument("--connect-every-ms", type=float, default=0.0, help="also open new connections; 0: do not")
    parser.add_argument("--at-once", type=int, default=1, help="unanswered questions that one connection may have")
    parser.add_argument("--patience-s", type=float, default=30.0, help="silent for longer is lost")
    return parser.parse_args()


def drive(asker: Asker, descriptor: int) -> None:
    """Answer words until `stop` or the end of the input."""
    os.set_blocking(descriptor, False)
    asker.watch_input(descriptor)
    words = {"begin": asker.begin, "end": asker.end, "round": asker.round}
    pending = b""
    while True:
        asker.turn()
        try:
            data = os.read(descriptor, 4096)
        except BlockingIOError:
            continue
        if not data:
            return
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            word = line.decode().strip()
            if word not in words:
                print(json.dumps({"event": word}), flush=True)
                return
            print(json.dumps({"event": word, **words[word]()}), flush=True)


def main() -> None:
    options = arguments()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        asker = Asker(options)
    except OSError as error:
        sys.exit(f"asker: cannot talk to {options.address} port {options.port}: {error}")
    print(json.dumps({"event": "ready"}), flush=True)
    drive(asker, sys.stdin.fileno())


if __name__ == "__main__":
    main()
