"""A program that does with sockets what it is told, and nothing by itself: so one socket can be put into any state.

It runs on both ends. In the clients machine as `python3 -m labs.programs.puppet --stdio` it takes one command a line
on standard input and answers each with one JSON object a line, with the command as `event`. As a service (arguments of
`pattern_server`) it takes the same commands from one connection at a time. A command is a JSON object: `do` is a method
of `Puppet`, the rest its arguments. `tell` hands a command on to the puppet at the other end of a connection.

What goes through a connection is given by the connection's name and direction, so that each end knows every byte that
the other has sent, whenever and in whatever pieces it comes.
"""

from __future__ import annotations

import array
import errno
import fcntl
import hashlib
import json
import select
import signal
import socket
import struct
import sys
import termios
import time
from pathlib import Path
from typing import Any

from labs.programs.pattern_server import arguments, daemonize, detach_stdio, listen

PATIENCE_S = 20.0
LOOK_S = 0.02
PIECE_BYTES = 65536
BLOCK_BYTES = 65521
"""Of a stream's contents, then they come again. A prime, so that no buffer's size divides it."""

TCP_STATES = (
    "", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE", "CLOSE_WAIT", "LAST_ACK",
    "LISTEN", "CLOSING",
)  # fmt: skip
SIOCATMARK, SIOCOUTQ = 0x8905, termios.TIOCOUTQ


class Stream:
    """One direction of a connection: its contents, and how far it has come."""

    def __init__(self, name: str) -> None:
        block = hashlib.shake_256(name.encode()).digest(BLOCK_BYTES)
        self._twice = block + block
        self.done = 0

    def piece(self, size: int) -> bytes:
        """The next bytes, at most a block."""
        start = self.done % BLOCK_BYTES
        return self._twice[start : start + min(size, BLOCK_BYTES)]

    def check(self, data: bytes) -> int:
        """How many of these, which came next, are wrong."""
        wrong = 0
        while data:
            expected = self.piece(len(data))
            if data[: len(expected)] != expected:
                wrong += sum(a != b for a, b in zip(data, expected, strict=False))
            self.done += len(expected)
            data = data[len(expected) :]
        return wrong


class Puppet:
    """The sockets by their names. Each method is a command; what it returns is the answer."""

    def __init__(self, side: str) -> None:
        self._side = side
        self._sockets: dict[str, socket.socket] = {}
        self._sent: dict[str, Stream] = {}
        self._received: dict[str, Stream] = {}

    def answer(self, line: str) -> dict[str, Any]:
        """Do what a line says. A socket's error is an answer, too."""
        command = json.loads(line)
        try:
            return getattr(self, command.pop("do"))(**command) or {}
        except OSError as error:
            return {"error": errno.errorcode.get(error.errno or 0, type(error).__name__)}

    def listen(self, name: str, address: str, port: int, backlog: int = 16) -> dict[str, Any]:
        """Listen; on `::` for IPv4, too."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, port), family=family, backlog=backlog, dualstack_ipv6=address == "::")
        self._sockets[name] = listener
        return {}

    def accept(self, listener: str, name: str) -> dict[str, Any]:
        """Take a connection that waits."""
        self._wait(self._sockets[listener], select.POLLIN)
        self._add(name, self._sockets[listener].accept()[0])
        return {}

    def connect(
        self, name: str, address: str, port: int, local_port: int = 0, options: tuple[tuple[int, int, int], ...] = ()
    ) -> dict[str, Any]:
        """Begin to connect, with options set before. `connected` waits for the end of it."""
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        self._add(name, sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for level, option, value in options:
            sock.setsockopt(level, option, value)
        if local_port:
            sock.bind(("", local_port))
        sock.connect_ex((address, port))
        return {}

    def connected(self, name: str) -> dict[str, Any]:
        """Wait until it is connected; its own port."""
        sock = self._sockets[name]
        self._wait(sock, select.POLLOUT)
        if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(code, "connect")
        return {"port": sock.getsockname()[1]}

    def send(self, name: str, size: int) -> dict[str, Any]:
        """Send the next so many bytes."""
        sock, stream, left = self._sockets[name], self._sent[name], size
        while left:
            self._wait(sock, select.POLLOUT)
            sent = sock.send(stream.piece(left))
            stream.done += sent
            left -= sent
        return {}

    def fill(self, name: str) -> dict[str, Any]:
        """Send until the other side's window is closed and nothing more goes into the socket; how many bytes went."""
        sock, stream = self._sockets[name], self._sent[name]
        before, end = stream.done, time.monotonic() + PATIENCE_S
        while True:
            full = _is_full(sock)
            if self._ready(sock, select.POLLOUT, LOOK_S):
                stream.done += sock.send(stream.piece(PIECE_BYTES))
            elif full:
                return {"bytes": stream.done - before}
            elif time.monotonic() > end:
                raise TimeoutError(errno.ETIMEDOUT, "the puppet's patience")

    def receive(self, name: str, size: int) -> dict[str, Any]:
        """Take so many bytes, or those before the end, and check them: `bytes`, `wrong`, and whether it `ended`."""
        sock, stream = self._sockets[name], self._received[name]
        before, wrong = stream.done, 0
        while (left := size - (stream.done - before)) > 0:
            self._wait(sock, select.POLLIN)
            data = sock.recv(min(left, PIECE_BYTES))
            if not data:
                return {"bytes": stream.done - before, "wrong": wrong, "ended": True}
            wrong += stream.check(data)
        return {"bytes": stream.done - before, "wrong": wrong, "ended": False}

    def end(self, name: str) -> dict[str, Any]:
        """Wait for the end of what the other side sends, which must be all that there is."""
        self._wait(self._sockets[name], select.POLLIN)
        return {"rest": len(self._sockets[name].recv(PIECE_BYTES))}

    def send_urgent(self, name: str, text: str) -> dict[str, Any]:
        """Send with MSG_OOB; the last byte is the urgent one."""
        return {"sent": self._sockets[name].send(text.encode(), socket.MSG_OOB)}

    def receive_text(self, name: str, size: int, *, urgent: bool = False) -> dict[str, Any]:
        """Take what is not of the stream: the urgent byte, or up to the urgent mark."""
        sock = self._sockets[name]
        self._wait(sock, select.POLLPRI if urgent else select.POLLIN)
        return {"text": sock.recv(size, socket.MSG_OOB if urgent else 0).decode()}

    def datagrams(self, name: str, address: str, port: int, peer: tuple[str, int] | None = None) -> dict[str, Any]:
        """A UDP socket, bound, and connected if there is a peer; its own port."""
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        self._add(name, sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        if peer:
            sock.connect(tuple(peer))
        return {"port": sock.getsockname()[1]}

    def send_text(self, name: str, text: str) -> dict[str, Any]:
        """Send what is not of the stream: one datagram."""
        return {"sent": self._sockets[name].send(text.encode())}

    def shutdown(self, name: str) -> dict[str, Any]:
        """Say that nothing more will be sent."""
        self._sockets[name].shutdown(socket.SHUT_WR)
        return {}

    def close(self, name: str) -> dict[str, Any]:
        """Close it."""
        self._sockets.pop(name).close()
        return {}

    def set(self, name: str, level: int, option: int, value: int | list[int]) -> dict[str, Any]:
        """Set an option: a number, or a struct of numbers."""
        packed = struct.pack(f"@{len(value)}i", *value) if isinstance(value, list) else value
        self._sockets[name].setsockopt(level, option, packed)
        return {}

    def get(self, name: str, options: list[tuple[int, int]]) -> dict[str, Any]:
        """Read options, as hexadecimal bytes."""
        sock = self._sockets[name]
        return {"values": [sock.getsockopt(level, option, 16).hex() for level, option in options]}

    def state(self, name: str) -> dict[str, Any]:
        """What TCP says of it: state, options (bit set), window scales, and its queues."""
        sock = self._sockets[name]
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        (again,) = struct.unpack_from("@I", info, 100)
        return {
            "state": TCP_STATES[info[0]],
            "options": info[5] & 0x7,
            "scales": info[6],
            "unread": _asked(sock, termios.FIONREAD),
            "unacknowledged": _asked(sock, SIOCOUTQ),
            "sent_again": again,
        }

    def marked(self, name: str) -> dict[str, Any]:
        """Whether reading has come to the urgent mark."""
        return {"marked": bool(_asked(self._sockets[name], SIOCATMARK))}

    def tell(self, name: str, command: dict[str, Any]) -> dict[str, Any]:
        """Have the puppet at the other end do something; its answer."""
        sock = self._sockets[name]
        sock.sendall(json.dumps(command).encode() + b"\n")
        line = b""
        while not line.endswith(b"\n"):
            self._wait(sock, select.POLLIN)
            if not (data := sock.recv(PIECE_BYTES)):
                raise ConnectionResetError(errno.ECONNRESET, "the other puppet is gone")
            line += data
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _add(self, name: str, sock: socket.socket) -> None:
        sock.setblocking(False)
        other = {"client": "service", "service": "client"}[self._side]
        self._sockets[name] = sock
        self._sent[name], self._received[name] = Stream(f"{name} of {self._side}"), Stream(f"{name} of {other}")

    def _wait(self, sock: socket.socket, event: int) -> None:
        if not self._ready(sock, event, PATIENCE_S):
            raise TimeoutError(errno.ETIMEDOUT, "the puppet's patience")

    @staticmethod
    def _ready(sock: socket.socket, event: int, patience_s: float) -> bool:
        poll = select.poll()
        poll.register(sock, event)
        end = time.monotonic() + patience_s
        while (left := end - time.monotonic()) > 0:
            if poll.poll(left * 1000):
                return True
        return False


def _is_full(sock: socket.socket) -> bool:
    """Whether nothing will leave the socket by itself any more: the other side's window is closed, and has answered for
    all that was sent (struct tcp_info of linux/tcp.h: tcpi_unacked, tcpi_snd_wnd)."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
    (on_the_way,), (window,) = struct.unpack_from("@I", info, 24), struct.unpack_from("@I", info, 228)
    return not on_the_way and not window


def _asked(sock: socket.socket, request: int) -> int:
    number = array.array("i", [0])
    fcntl.ioctl(sock, request, number)
    return number[0]


def obey_stdio() -> None:
    """Take commands from standard input until it ends."""
    puppet = Puppet("client")
    print(json.dumps({"event": "ready"}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"event": line.strip(), **puppet.answer(line)}), flush=True)


def obey_connections(listener: socket.socket) -> None:
    """Take commands from one connection after the other, until a signal ends the process."""
    puppet = Puppet("service")
    while True:
        control, _ = listener.accept()
        with control, control.makefile("rw") as lines:
            for line in lines:
                lines.write(json.dumps(puppet.answer(line)) + "\n")
                lines.flush()


def main() -> None:
    if sys.argv[1:] == ["--stdio"]:
        obey_stdio()
        return
    options = arguments().parse_args()
    listener = listen(options.address[0], options.port)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if options.daemon:
        daemonize(Path(options.pid_file))
    detach_stdio()
    obey_connections(listener)


if __name__ == "__main__":
    main()
