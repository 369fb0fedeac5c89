"""Load on the pattern service: many connections, every byte checked, every silence measured.

Runs in the clients machine as `python3 -m labs.clients.load`, one thread, standard library only. It takes
one word a line on standard input (`begin`, `end`: an interval of interest, called a hop; `snapshot`;
`stop`) and answers each with one JSON object a line. It ends by itself when its input ends. It never
connects again: what is lost stays lost.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import selectors
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from labs.programs.pattern import ASK, HELLO, MEMORY, MEMORY_ANSWER, STREAM, ClientHalf

READ_BYTES = 65536
CONNECT_TIMEOUT_S = 5.0
DRAIN_S = 5.0
PATIENCE_S = 15.0
"""A connection that was silent for so long is given up and counts as lost."""

HELD_BACK_RECORDS = 512
"""So many records may be on their way; then a connection waits for answers before it asks again."""

STREAM_EVERY = 5
STREAM_INTERVAL_MS = 10
ASK_INTERVALS_MS = (4, 6, 8, 10, 12, 14, 16, 20)

TCP_INFO_TOTAL_RETRANS = 100
"""Offset of tcpi_total_retrans in struct tcp_info (linux/tcp.h)."""


@dataclass
class Seen:
    """What the clients saw; the same for a hop and for the whole run."""

    connections: int = 0
    lost: int = 0
    resets: int = 0
    wrong_bytes: int = 0
    longest_gap_ms: float = 0.0
    retransmissions: int = 0
    requests: int = 0
    answers: int = 0
    seconds: float = 0.0
    gaps_ms: list[float] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)


def send_output(selector: selectors.BaseSelector, sock: socket.socket, output: bytearray) -> None:
    """Send what the socket takes now; the selector tells when it takes more, as long as there is more."""
    try:
        sent = sock.send(output)
    except BlockingIOError:
        sent = 0
    del output[:sent]
    key = selector.get_key(sock)
    wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if output else 0)
    if key.events != wanted:
        selector.modify(sock, wanted, key.data)


def retransmissions_of(sock: socket.socket) -> int:
    """The kernel's own count of what it sent again on a TCP socket."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
    (count,) = struct.unpack_from("@I", info, TCP_INFO_TOTAL_RETRANS)
    return int(count)


class Connection:
    """One client connection and everything that happened to it."""

    def __init__(self, number: int, sock: socket.socket, half: ClientHalf, interval_s: float) -> None:
        self.number = number
        self.sock = sock
        self.half = half
        self.interval_s = interval_s
        self.output = bytearray(half.hello())
        self.alive = True
        self.lost = self.resets = self.wrong_bytes = self.requests = self.retransmissions = 0
        self.trouble = ""
        self.last_answer = time.monotonic()
        self.longest_gap_s = self.longest_hop_gap_s = 0.0

    def answered(self, now: float) -> None:
        self.note_silence(now)
        self.last_answer = now

    def note_silence(self, now: float) -> None:
        gap = now - self.last_answer
        self.longest_gap_s = max(self.longest_gap_s, gap)
        self.longest_hop_gap_s = max(self.longest_hop_gap_s, gap)

    def count_retransmissions(self) -> int:
        if self.alive:
            self.retransmissions = retransmissions_of(self.sock)
        return self.retransmissions


class Load:
    """All connections and the one loop that drives them."""

    def __init__(self, address: str, port: int, connections: int, patience_s: float = PATIENCE_S) -> None:
        self._selector = selectors.DefaultSelector()
        self._patience_s = patience_s
        self._started = self._hop_started = time.monotonic()
        self._due: list[tuple[float, int]] = []
        self.connections = [self._connect(address, port, number) for number in range(connections)]
        self._before_hop = self.whole_run()

    def _connect(self, address: str, port: int, number: int) -> Connection:
        sock = socket.create_connection((address, port), timeout=CONNECT_TIMEOUT_S)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        mode = STREAM if number % STREAM_EVERY == STREAM_EVERY - 1 else ASK
        interval_ms = STREAM_INTERVAL_MS if mode == STREAM else ASK_INTERVALS_MS[number % len(ASK_INTERVALS_MS)]
        half = ClientHalf(mode, os.urandom(16), STREAM_INTERVAL_MS)
        connection = Connection(number, sock, half, interval_ms / 1000)
        self._selector.register(sock, selectors.EVENT_READ, connection)
        heapq.heappush(self._due, (time.monotonic(), number))
        return connection

    # The loop

    def turn(self, *, asking: bool = True, wait_s: float = 1.0) -> None:
        """Wait for something to do, at most `wait_s`, and do all of it."""
        now = time.monotonic()
        if asking and self._due:
            wait_s = min(wait_s, max(self._due[0][0] - now, 0))
        ready = self._selector.select(wait_s)
        now = time.monotonic()
        for key, events in ready:
            if key.data is not None:
                self._serve(key.data, events, now)
        if asking:
            self._ask(now)
        for connection in self.connections:
            if connection.alive and now - connection.last_answer > self._patience_s:
                connection.lost = 1
                self._give_up(connection, f"no answer for {self._patience_s:.0f} s")

    def watch_input(self, descriptor: int) -> None:
        """Make `turn` return when there is something to read from `descriptor`."""
        self._selector.register(descriptor, selectors.EVENT_READ, None)

    def _ask(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            due, number = heapq.heappop(self._due)
            connection = self.connections[number]
            if not connection.alive:
                continue
            if connection.half.unanswered < HELD_BACK_RECORDS:
                connection.output += connection.half.record()
                connection.requests += 1
                self._serve(connection, selectors.EVENT_WRITE, now)
            # Steady, but without a burst for turns that were missed.
            heapq.heappush(self._due, (max(due + connection.interval_s, now), number))

    def _serve(self, connection: Connection, events: int, now: float) -> None:
        if not connection.alive:
            return
        try:
            if events & selectors.EVENT_READ:
                self._receive(connection, now)
            if connection.alive and connection.output:
                send_output(self._selector, connection.sock, connection.output)
        except BlockingIOError:
            return
        except (ConnectionResetError, BrokenPipeError) as error:
            connection.resets = 1
            self._give_up(connection, str(error))
        except OSError as error:
            connection.lost = 1
            self._give_up(connection, str(error))

    def _receive(self, connection: Connection, now: float) -> None:
        data = connection.sock.recv(READ_BYTES)
        if not data:
            connection.lost = 1
            self._give_up(connection, "closed by the other side")
            return
        before = connection.half.frames
        wrong = connection.half.check(data)
        if connection.half.frames > before:
            connection.answered(now)
        if wrong:
            connection.wrong_bytes = wrong
            self._give_up(connection, f"{wrong} wrong bytes in answer {connection.half.frames}")

    def _give_up(self, connection: Connection, why: str) -> None:
        now = time.monotonic()
        connection.count_retransmissions()
        connection.note_silence(now)
        connection.trouble = f"connection {connection.number}, {now - self._started:.3f} s after the start: {why}"
        connection.alive = False
        self._selector.unregister(connection.sock)
        connection.sock.close()

    def close(self) -> None:
        """Close every connection, without a word."""
        for connection in self.connections:
            connection.alive = False
            connection.sock.close()
        self._selector.close()

    # What was seen

    def whole_run(self) -> Seen:
        now = time.monotonic()
        seen = Seen(seconds=round(now - self._started, 3))
        for connection in self.connections:
            if connection.alive:
                connection.note_silence(now)
            seen.connections += connection.alive
            seen.lost += connection.lost
            seen.resets += connection.resets
            seen.wrong_bytes += connection.wrong_bytes
            seen.retransmissions += connection.count_retransmissions()
            seen.requests += connection.requests
            seen.answers += connection.half.frames
            seen.gaps_ms.append(round(connection.longest_gap_s * 1000, 1))
            seen.troubles += [connection.trouble] if connection.trouble else []
        seen.longest_gap_ms = max(seen.gaps_ms, default=0.0)
        return seen

    def begin_hop(self) -> Seen:
        self._before_hop = self.whole_run()
        self._hop_started = time.monotonic()
        for connection in self.connections:
            connection.longest_hop_gap_s = 0.0
        return self._before_hop

    def end_hop(self) -> Seen:
        """The difference to `begin_hop`. `connections` are those that were alive when the hop began."""
        before, hop = self._before_hop, self.whole_run()
        hop.connections = before.connections
        for name in ("lost", "resets", "wrong_bytes", "retransmissions", "requests", "answers"):
            setattr(hop, name, getattr(hop, name) - getattr(before, name))
        hop.gaps_ms = [round(connection.longest_hop_gap_s * 1000, 1) for connection in self.connections]
        hop.longest_gap_ms = max(hop.gaps_ms, default=0.0)
        hop.troubles = [trouble for trouble in hop.troubles if trouble not in before.troubles]
        hop.seconds = round(time.monotonic() - self._hop_started, 3)
        return hop

    def finish(self) -> Seen:
        """Ask no more, wait for the answers that are due, and say how it was. What never came is lost."""
        deadline = time.monotonic() + DRAIN_S
        while self._open() and time.monotonic() < deadline:
            self.turn(asking=False, wait_s=0.05)
        for connection in self._open():
            connection.lost = 1
            self._give_up(connection, f"{connection.half.unanswered} records were never answered")
        seen = self.whole_run()
        seen.connections = len(self.connections)
        return seen

    def _open(self) -> list[Connection]:
        return [each for each in self.connections if each.alive and each.half.unanswered]


def commands(load: Load, descriptor: int, max_seconds: float) -> Iterator[str]:
    """Drive the load, yielding each word that arrives; ends with the input, `stop`, or the time."""
    os.set_blocking(descriptor, False)
    load.watch_input(descriptor)
    deadline = time.monotonic() + max_seconds
    pending = b""
    while time.monotonic() < deadline:
        load.turn()
        try:
            data = os.read(descriptor, 4096)
        except BlockingIOError:
            continue
        if not data:
            return
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            word = line.decode().strip()
            if word == "stop":
                return
            yield word


def say(event: str, **values: Any) -> None:
    print(json.dumps({"event": event, **values}), flush=True)


def check_memory(address: str, port: int, timeout_s: float = 60.0) -> dict[str, int]:
    """Ask the service to look at all of its memory: how many pages it holds, and how many were ever wrong."""
    with socket.create_connection((address, port), timeout=timeout_s) as sock:
        sock.sendall(HELLO.pack(MEMORY, bytes(16), 0))
        answer = b""
        while len(answer) < MEMORY_ANSWER.size:
            data = sock.recv(MEMORY_ANSWER.size)
            if not data:
                raise ConnectionError(f"{address} port {port} closed the connection instead of checking its memory")
            answer += data
    pages, wrong = MEMORY_ANSWER.unpack(answer)
    return {"pages": pages, "wrong_pages": wrong}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="load", description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, default=20)
    parser.add_argument("--patience-s", type=float, default=PATIENCE_S)
    parser.add_argument("--max-seconds", type=float, default=900.0)
    parser.add_argument("--check-memory", action="store_true", help="only ask how the service's memory is")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    where = f"{options.address} port {options.port}"
    try:
        if options.check_memory:
            say("memory", **check_memory(options.address, options.port))
            return
        load = Load(options.address, options.port, options.connections, options.patience_s)
    except OSError as error:
        sys.exit(f"load: cannot talk to {where}: {error}")
    say("ready", **vars(load.whole_run()))
    actions = {"begin": load.begin_hop, "end": load.end_hop, "snapshot": load.whole_run}
    for word in commands(load, sys.stdin.fileno(), options.max_seconds):
        if word in actions:
            say(word, **vars(actions[word]()))
        else:
            sys.exit(f"load: {word!r} is not one of {', '.join(actions)}, stop")
    say("stop", **vars(load.finish()))


if __name__ == "__main__":
    main()
