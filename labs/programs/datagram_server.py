"""A service that sends every datagram back, from one socket for all clients or from one connected to a client.

A datagram that begins with `c` makes a socket that is connected to its sender, which all that follow go to (as servers
of DTLS and QUIC have them); any other is answered by the socket that all share. It listens for TCP on its port as well,
by which the lab knows that it is there. Arguments are those of `pattern_server`.
"""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import sys

from labs.programs.pattern_server import arguments, daemonize, detach_stdio, listen

DATAGRAM_BYTES = 2048
CONNECT = b"c"


class DatagramServer:
    """Its sockets: one a service address, and one a client that wants one."""

    def __init__(self, addresses: list[str], port: int) -> None:
        self._selector = selectors.DefaultSelector()
        for address in addresses:
            self._selector.register(self._bound(address, port), selectors.EVENT_READ, self._answer_anybody)

    def run(self) -> None:
        """Serve until a signal ends the process."""
        while True:
            for key, _ in self._selector.select():
                key.data(key.fileobj)

    @staticmethod
    def _bound(address: str, port: int) -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.setblocking(False)
        return sock

    def _answer_anybody(self, sock: socket.socket) -> None:
        while True:
            try:
                data, peer = sock.recvfrom(DATAGRAM_BYTES)
            except BlockingIOError:
                return
            if data.startswith(CONNECT):
                own = self._bound(*sock.getsockname()[:2])
                own.connect(peer)
                own.send(data)
                self._selector.register(own, selectors.EVENT_READ, self._answer_one)
            else:
                sock.sendto(data, peer)

    @staticmethod
    def _answer_one(sock: socket.socket) -> None:
        try:
            while True:
                sock.send(sock.recv(DATAGRAM_BYTES))
        except (BlockingIOError, ConnectionRefusedError):
            return  # nothing more, or the client is gone


def main() -> None:
    options = arguments().parse_args()
    server = DatagramServer(options.address, options.port)
    listeners = [listen(address, options.port) for address in options.address]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if options.daemon:
        daemonize(options.pid_file)
    detach_stdio()
    with contextlib.ExitStack() as stay_open:
        for listener in listeners:
            stay_open.enter_context(listener)
        server.run()


if __name__ == "__main__":
    main()
