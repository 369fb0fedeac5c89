"""Packets that arrived at another host, given to this one as if they had arrived here. Standard library only.

A raw socket sends them over the loopback interface to the address they name, which is this host's. The route that the
kernel found on sending stays with such a packet, so that it is not asked whether its source may come in there (no
rp_filter, no martians; net/ipv4/ip_input.c, `ip_rcv_finish_core`). On its way it meets the rules of `output`,
`prerouting` and `input`.
"""

import contextlib
import socket
from collections.abc import Sequence
from typing import Protocol

from .errors import from_errno
from .namespace import Home


class Delivery(Protocol):
    """The way in for packets that came elsewhere."""

    async def deliver(self, packets: Sequence[bytes]) -> None:
        """Give this host whole IP packets to an address of its own, in their order.

        One that the kernel or a firewall does not let pass is lost, as it could be on any way. Raises
        NotPermittedError, KernelRefusedError.
        """

    def close(self) -> None:
        """Let go of the sockets; idempotent."""


class LoopbackDelivery:
    """Into the network namespace of the thread that makes it. See `Delivery`."""

    def __init__(self) -> None:
        self._home = Home()
        self._sockets: dict[int, socket.socket] = {}

    async def deliver(self, packets: Sequence[bytes]) -> None:
        for packet in packets:
            version = packet[0] >> 4
            family, destination = (socket.AF_INET6, packet[24:40]) if version == 6 else (socket.AF_INET, packet[16:20])
            sender = self._sockets.get(version) or self._open(version, family)
            with contextlib.suppress(OSError):
                sender.sendto(packet, (socket.inet_ntop(family, destination), 0))

    def _open(self, version: int, family: socket.AddressFamily) -> socket.socket:
        try:
            with self._home.entered():
                # IPPROTO_RAW: packets come with their IP header (raw(7)), and none is received.
                made = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_RAW)
        except OSError as error:
            raise from_errno(error.errno or 0, "opening a raw socket") from error
        self._sockets[version] = made
        return made

    def close(self) -> None:
        for each in self._sockets.values():
            each.close()
        self._sockets.clear()
        self._home.close()


class FakeDelivery:
    """A way in, in memory, for tests: `delivered` is what was given to this host."""

    def __init__(self) -> None:
        self.delivered: list[bytes] = []
        self.closed = False

    async def deliver(self, packets: Sequence[bytes]) -> None:
        self.delivered += packets

    def close(self) -> None:
        self.closed = True
