"""How much more UDP the sockets of this host can take, port by port (sock_diag with INET_DIAG_SKMEMINFO).

A datagram that finds its socket's receive buffer full is lost, and nobody is told. What a hold has gathered while a
service was frozen easily is more than such a buffer takes: the default of 212 992 bytes is 277 small datagrams over
veth, or 92 full ones. So a release looks here first.
"""

import errno
import struct
from collections.abc import Collection

from .errors import from_errno
from .hold_buffer import Room
from .netlink import NETLINK_SOCK_DIAG, NLM_F_DUMP, NLM_F_REQUEST, NetlinkSocket, Refusal, attributes

_SOCK_DIAG_BY_FAMILY = 20
_UDP = 17
_FAMILIES = (2, 10)
_ALL_STATES = 0xFFFFFFFF
_SKMEMINFO = 7
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI48x")
_ANSWER_BYTES = 72
_PORT_OFFSET = _HEADER.size + 4
_MEMORY = struct.Struct("=II")
"""SK_MEMINFO_RMEM_ALLOC, SK_MEMINFO_RCVBUF, the first of several (include/uapi/linux/sock_diag.h)."""


class UdpRooms:
    """The UDP receive buffers in the network namespace of the thread that makes it. Undo: `close`."""

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_SOCK_DIAG, "reading sockets")

    def read(self, ports: Collection[int]) -> dict[int, Room]:
        """The room of the fullest socket of each of these ports; ports without a socket are left out."""
        rooms: dict[int, Room] = {}
        for family in _FAMILIES:
            for port, used, limit in self._dump(family):
                if port in ports:
                    known = rooms.get(port)
                    free = limit - used if known is None else min(known.free_bytes, limit - used)
                    rooms[port] = Room(free, used == 0 and (known is None or known.empty))
        return rooms

    def _dump(self, family: int) -> list[tuple[int, int, int]]:
        body = _REQUEST.pack(family, _UDP, 1 << (_SKMEMINFO - 1), _ALL_STATES)
        header = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, 1, 0)
        try:
            answers = self._netlink.request(header + body)
        except Refusal as refusal:
            if refusal.number == errno.ENOENT:
                return []  # a kernel without IPv6, or without UDP's part of inet_diag: then there is no looking first
            raise from_errno(refusal.number, "reading sockets", refusal.detail) from refusal
        found = []
        for answer in answers:
            port = int.from_bytes(answer.data[_PORT_OFFSET : _PORT_OFFSET + 2], "big")
            for kind, value in attributes(answer.data, _HEADER.size + _ANSWER_BYTES):
                if kind == _SKMEMINFO:
                    found.append((port, *_MEMORY.unpack_from(value)))
        return found

    def close(self) -> None:
        """Close the socket; idempotent."""
        self._netlink.close()
