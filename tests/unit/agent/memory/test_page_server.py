"""The page server as ``criu lazy-pages`` speaks with it."""

from __future__ import annotations

import os
import socket
import struct

import pytest

from coordinator.agent.memory.page_server import Layout, PageServer
from coordinator.agent.memory.store import PAGE_BYTES


def content(pid: int, address: int, pages: int) -> bytes:
    return struct.pack("=QQ", pid, address) * (pages * PAGE_BYTES // 16)


class Daemon:
    """The other end of the conversation, with a header of its own reckoning."""

    def __init__(self, server: PageServer, header: struct.Struct) -> None:
        self._socket = socket.socket(fileno=os.dup(server.daemon_socket))
        self._header = header
        server.start()

    def send(self, command: int, pages: int, address: int, pid: int) -> None:
        self._socket.sendall(self._header.pack(command, pages, address, pid))

    def receive(self, size: int) -> bytes:
        return self._socket.recv(size, socket.MSG_WAITALL)

    def get(self, pages: int, address: int, pid: int) -> bytes:
        self.send(7, pages, address, pid)
        answer = self._header.unpack(self.receive(self._header.size))
        assert answer == (6 | 4 << 16, pages, address, pid)
        return self.receive(pages * PAGE_BYTES)

    def close(self) -> None:
        self._socket.close()


@pytest.mark.parametrize(
    ("version", "header"), [("4.2.1", "=I4xQQQ"), ("5.0", "=I4xQQQ"), ("4.1.1", "=IIQQ"), ("3.19", "=IIQQ")]
)
def test_pages_are_served_in_the_layout_of_the_daemon(version: str, header: str) -> None:
    server = PageServer(Layout.of_version(version), content)
    daemon = Daemon(server, struct.Struct(header))
    assert daemon.get(1, 0x1000, 7) == content(7, 0x1000, 1)
    assert daemon.get(1024, 0x7F0000000000, 1) == content(1, 0x7F0000000000, 1024)
    daemon.send(0x1024, 0, 0, 0)
    assert daemon.receive(4) == bytes(4)
    daemon.close()
    assert server.close() is None
    assert server.served_pages == 1025


def test_a_daemon_that_ends_ends_the_conversation() -> None:
    server = PageServer(Layout.of_version("4.2"), content)
    Daemon(server, struct.Struct("=I4xQQQ")).close()
    assert server.close() is None


def test_a_page_that_cannot_be_had_ends_it_with_the_reason() -> None:
    def lost(pid: int, address: int, pages: int) -> bytes:
        raise ConnectionError("the source is gone")

    server = PageServer(Layout.of_version("4.2"), lost)
    daemon = Daemon(server, struct.Struct("=I4xQQQ"))
    daemon.send(7, 1, 0, 1)
    assert daemon.receive(1) == b""
    daemon.close()
    assert isinstance(server.close(), ConnectionError)


def test_an_unknown_command_is_refused() -> None:
    server = PageServer(Layout.of_version("4.2"), content)
    daemon = Daemon(server, struct.Struct("=I4xQQQ"))
    daemon.send(99, 1, 0, 1)
    assert daemon.receive(1) == b""
    daemon.close()
    assert isinstance(server.close(), ValueError)


def test_a_server_that_was_never_started_can_be_closed() -> None:
    assert PageServer(Layout.of_version("4.2"), content).close() is None
