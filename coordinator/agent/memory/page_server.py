"""Serves pages to ``criu lazy-pages`` over a socket pair, in CRIU's page-server protocol (criu/page-xfer.c).

The daemon asks for what its images mark as lazy: what a task touches at once, the rest in the background. It is handed
one end of the socket pair (``--ps-socket``), so no port is open to anybody else. The server is a thread, because a task
is waiting in the kernel for each answer and must not wait for the agent's event loop too.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass

from coordinator.agent.memory.store import PAGE_BYTES

_GET, _ADD_WITH_FLAGS = 7, 6
_CLOSE, _FORCE_CLOSE = 0x1023, 0x1024
_COMMAND_BITS = 16
_PRESENT = 1 << 2
#: The daemon's largest request is 4 MiB (criu/uffd.c, DEFAULT_XFER_LEN and its growth).
_MAX_PAGES = 64 * 1024 * 1024 // PAGE_BYTES

#: (pid, address, pages) → content. Called from the server's thread.
Pages = Callable[[int, int, int], bytes]


@dataclass(frozen=True, slots=True)
class Layout:
    """The header's layout: ``nr_pages`` has 64 bits, with padding before it, from CRIU 4.2 on."""

    header: struct.Struct

    @classmethod
    def of_version(cls, version: str) -> Layout:
        """The layout of a CRIU of that version, e.g. "4.2.1"."""
        parts = [int(part) if part.isdigit() else 0 for part in version.split(".")[:2]]
        return cls(struct.Struct("=I4xQQQ") if parts >= [4, 2] else struct.Struct("=IIQQ"))


class PageServer:
    """One conversation with one daemon. ``served_pages`` counts what was asked for."""

    def __init__(self, layout: Layout, pages: Pages) -> None:
        ours, self._theirs = socket.socketpair()
        self._socket = ours
        self._layout = layout
        self._pages = pages
        self._failure: BaseException | None = None
        self.served_pages = 0
        self._thread = threading.Thread(target=self._serve, name="page-server", daemon=True)

    @property
    def daemon_socket(self) -> int:
        """The descriptor to hand to the daemon."""
        return self._theirs.fileno()

    def start(self) -> None:
        """Begin to serve; call it when the daemon has its end."""
        self._theirs.close()
        self._thread.start()

    def close(self) -> BaseException | None:
        """End the conversation, wait for the thread, and return what made it fail, if anything did. Idempotent."""
        self._theirs.close()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive():
            self._thread.join()
        self._socket.close()
        return self._failure

    def _serve(self) -> None:
        try:
            while header := self._receive():
                command, count, address, pid = self._layout.header.unpack(header)
                if command in (_CLOSE, _FORCE_CLOSE):
                    self._socket.sendall(struct.pack("=i", 0))
                    return
                if command & 0xFFFF != _GET or not 0 < count <= _MAX_PAGES:
                    raise ValueError(f"the daemon sent command {command:#x} for {count} pages")
                content = self._pages(pid, address, count)
                flags = _ADD_WITH_FLAGS | _PRESENT << _COMMAND_BITS
                self._socket.sendall(self._layout.header.pack(flags, count, address, pid))
                self._socket.sendall(content)
                self.served_pages += count
        except Exception as error:  # told by close(): a thread has nobody to raise to
            self._failure = error
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _receive(self) -> bytes:
        header = bytearray()
        while len(header) < self._layout.header.size:
            part = self._socket.recv(self._layout.header.size - len(header))
            if not part:
                return b""
            header += part
        return bytes(header)
