"""Clients of the datagram service: numbered datagrams at a steady pace over connected sockets, and what became of them.

Runs in the clients machine as `python3 -m labs.clients.datagrams`, one thread, standard library only. Each address has
two sockets: one that the service answers from the socket of all, and one that it makes a socket for. It takes one word
a line on standard input and answers each with one JSON object a line: `snapshot`: what was seen until now; `stop`: send
no more, wait for the last answers, tell and end.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import socket
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

DRAIN_S = 2.0
ROOM_BYTES = 4 << 20
"""For answers: what is lost is to be the service's loss, not ours."""


@dataclass
class Seen:
    """`refused`: that the kernel was told that nobody has the port; `disordered`: answers out of their order."""

    sent: int = 0
    answered: int = 0
    refused: int = 0
    disordered: int = 0


class Client:
    """One socket."""

    def __init__(self, address: str, port: int, kind: bytes) -> None:
        self.sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, ROOM_BYTES)
        self.sock.connect((address, port))
        self.seen = Seen()
        self._last = -1
        # The first is waited for: it may make a socket, and until that is there the others would go to the one of all.
        self.sock.settimeout(10)
        self.sock.send(kind)
        self.sock.recv(64)
        self.sock.setblocking(False)

    def send(self) -> None:
        try:
            self.sock.send(b"%d" % self.seen.sent)
            self.seen.sent += 1
        except ConnectionRefusedError:
            self.seen.refused += 1

    def receive(self) -> None:
        while True:
            try:
                number = int(self.sock.recv(64))
            except BlockingIOError:
                return
            except ConnectionRefusedError:
                self.seen.refused += 1
                continue
            self.seen.answered += 1
            self.seen.disordered += number <= self._last
            self._last = max(self._last, number)


class Datagrams:
    """All clients, and the one loop that drives them."""

    def __init__(self, addresses: list[str], port: int, interval_s: float) -> None:
        self._interval_s = interval_s
        self._selector = selectors.DefaultSelector()
        self._clients = [Client(address, port, kind) for address in addresses for kind in (b"a", b"c")]
        for client in self._clients:
            self._selector.register(client.sock, selectors.EVENT_READ, client)
        self._turn = 0
        self._due = time.monotonic()

    def watch_input(self, descriptor: int) -> None:
        """Make `turn` return when there is something to read from `descriptor`."""
        self._selector.register(descriptor, selectors.EVENT_READ, None)

    def turn(self, *, sending: bool = True, longest_s: float = 1.0) -> None:
        """Send what is due, round over the clients, and take what has come."""
        while sending and self._due <= time.monotonic():
            self._clients[self._turn % len(self._clients)].send()
            self._turn += 1
            self._due += self._interval_s
        wait_s = max(self._due - time.monotonic(), 0) if sending else longest_s
        for key, _ in self._selector.select(wait_s):
            if key.data is not None:
                key.data.receive()

    def finish(self) -> None:
        """Wait for the last answers."""
        end = time.monotonic() + DRAIN_S
        while any(each.seen.answered < each.seen.sent for each in self._clients) and time.monotonic() < end:
            self.turn(sending=False, longest_s=0.05)

    def report(self) -> dict[str, Any]:
        return {"clients": [asdict(each.seen) for each in self._clients]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True, action="append")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--a-second", type=float, default=1000.0, help="datagrams, all clients together")
    parser.add_argument("--max-seconds", type=float, default=300.0)
    options = parser.parse_args()
    datagrams = Datagrams(options.address, options.port, 1 / options.a_second)
    os.set_blocking(sys.stdin.fileno(), False)
    datagrams.watch_input(sys.stdin.fileno())
    print(json.dumps({"event": "ready"}), flush=True)
    end = time.monotonic() + options.max_seconds
    while time.monotonic() < end:
        datagrams.turn()
        try:
            word = os.read(sys.stdin.fileno(), 64).decode().strip()
        except BlockingIOError:
            continue
        if word == "snapshot":
            print(json.dumps({"event": word, **datagrams.report()}), flush=True)
            continue
        datagrams.finish()
        print(json.dumps({"event": "stop", **datagrams.report()}), flush=True)
        return


if __name__ == "__main__":
    main()
