"""NFQUEUE over netlink: one queue of packets that the kernel keeps until a verdict is given (nfnetlink_queue).

Written with struct, as the packets come one netlink message each and by the ten thousand. Source: the kernel's
include/uapi/linux/netfilter/nfnetlink_queue.h. Every queue holds packets as they are, uncut (NFQA_CFG_F_GSO); the
kernel copies their first 128 bytes to us, and keeps the rest. NFQA_CFG_F_FAIL_OPEN is never set: a packet that finds
no room is dropped, not let through.
"""

import errno
import os
import secrets
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .errors import KernelLacksError, KernelRefusedError, from_errno
from .hold_buffer import OTHER, HeldPacket, HoldLimits, classify
from .netlink import NETLINK_NETFILTER, NLM_F_ACK, NLM_F_REQUEST, NetlinkSocket, Refusal

DROP, ACCEPT = 0, 1

_SUBSYSTEM = 3
_PACKET, _VERDICT, _CONFIG, _VERDICT_BATCH = (_SUBSYSTEM << 8 | kind for kind in range(4))
_VERDICT_HEADER = 2
_CFG_CMD, _CFG_PARAMS, _CFG_QUEUE_MAXLEN, _CFG_MASK, _CFG_FLAGS = 1, 2, 3, 4, 5
_BIND = 1
_COPY_PACKET = 2
_COPY_BYTES = 128
_F_GSO = 1 << 2

_PAYLOAD, _CAP_LEN = 10, 13
_HEADER = struct.Struct("=IHHIIBB2s")
"""nlmsghdr and nfgenmsg; the last field, the queue's number, is in network byte order."""
_KIND = struct.Struct("=4xH")
_PACKET_HEADER = struct.Struct("!IH")
_ATTRIBUTE = struct.Struct("=HH")
_LENGTH = struct.Struct("!I")
_VERDICT_VALUES = struct.Struct("!II")
_VERDICT_BYTES = _HEADER.size + _ATTRIBUTE.size + _VERDICT_VALUES.size

_RECEIVE_BUFFER = 32 << 20
"""What may wait for the event loop, in the kernel's own counting (about 1 KiB a packet)."""
_SLACK = 4096
"""How many packets more than the limits the kernel may queue: those that nobody has looked at yet."""
_VERDICTS_PER_SEND = 512
_NUMBERS = range(1024, 65536)
_TRIES = 64
_COUNTERS = "/proc/thread-self/net/netfilter/nfnetlink_queue"
_MISSING = (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT)
"""What nfnetlink answers for a subsystem that is not there: EINVAL."""


class Counters(NamedTuple):
    """The kernel's own: packets waiting for a verdict now, and dropped because queue or socket buffer was full."""

    waiting: int
    dropped: int


class PacketQueue:
    """A queue bound to this object, in the network namespace of the thread that makes it. Undo: `close`."""

    def __init__(self, limits: HoldLimits, number: int | None = None) -> None:
        """Bind the queue of that number, or one that is free.

        Raises KernelLacksError where there is no NFQUEUE, NotPermittedError, KernelRefusedError if it is taken.
        """
        self._netlink = NetlinkSocket(NETLINK_NETFILTER, "packet hold")
        self._counters = -1
        self._buffer = bytearray(4096)
        self._view = memoryview(self._buffer)
        self.refused_verdicts = 0
        try:
            self._netlink.bear_bursts(_RECEIVE_BUFFER)
            self._counters = _open_counters()
            self.number = self._bind(limits, number)
        except BaseException:
            self.close()
            raise

    def _bind(self, limits: HoldLimits, wanted: int | None) -> int:
        for _ in range(_TRIES if wanted is None else 1):
            number = secrets.choice(_NUMBERS) if wanted is None else wanted
            try:
                self._netlink.request(_config(number, limits))
            except Refusal as refusal:
                if refusal.number in _MISSING:
                    raise KernelLacksError("packet hold: the kernel has no NFQUEUE") from refusal
                # Another's queue is EBUSY or EPERM; without the capability everything is EPERM.
                if refusal.number not in (errno.EBUSY, errno.EPERM) or number not in self._rows():
                    raise from_errno(refusal.number, "packet hold", refusal.detail) from refusal
                continue
            return number
        raise KernelRefusedError(f"packet hold: queue {number} has a listener already")

    def _rows(self) -> dict[int, list[int]]:
        """The kernel's table of queues by number: the columns after it."""
        lines = os.pread(self._counters, 1 << 16, 0).decode().splitlines()
        return {row[0]: row[1:] for row in ([int(word) for word in line.split()] for line in lines) if row}

    def counters(self) -> Counters:
        """Ask the kernel (some tens of microseconds)."""
        # Columns: listener, waiting, copy mode and range, dropped for want of room in the queue, in the socket buffer.
        row = self._rows().get(self.number)
        return Counters(row[1], row[4] + row[5]) if row else Counters(0, 0)

    def fileno(self) -> int:
        """To wait for packets with."""
        return self._netlink.fileno()

    def receive(self, limit: int) -> list[HeldPacket]:
        """The packets that have come, at most `limit`; none: there are no more at this moment."""
        packets: list[HeldPacket] = []
        receive, view = self._netlink.receive_into, self._view
        for _ in range(limit):
            length = receive(view)
            if length == 0:
                break
            packet = _parse(view[:length])
            if packet is not None:
                packets.append(packet)
            else:
                self.refused_verdicts += 1
        return packets

    def accept_up_to(self, ident: int) -> None:
        """Let go of all packets up to this one, in their order: the kernel has worked them off when this returns."""
        self._netlink.send(self._verdict(_VERDICT_BATCH, ACCEPT, ident))

    def give(self, verdict: int, idents: Sequence[int]) -> None:
        """`ACCEPT` or `DROP` single packets, in the order given."""
        for start in range(0, len(idents), _VERDICTS_PER_SEND):
            chunk = idents[start : start + _VERDICTS_PER_SEND]
            self._netlink.send(b"".join([self._verdict(_VERDICT, verdict, ident) for ident in chunk]))

    def _verdict(self, kind: int, verdict: int, ident: int) -> bytes:
        return b"".join(
            (
                _header(_VERDICT_BYTES, kind, NLM_F_REQUEST, self.number),
                _ATTRIBUTE.pack(_ATTRIBUTE.size + _VERDICT_VALUES.size, _VERDICT_HEADER),
                _VERDICT_VALUES.pack(verdict, ident),
            )
        )

    def close(self) -> None:
        """Give up the queue: the kernel drops what waits in it. Idempotent."""
        self._netlink.close()
        if self._counters >= 0:
            os.close(self._counters)
            self._counters = -1


def listened_to() -> set[int]:
    """The queues of the calling thread's network namespace that somebody has bound; none without NFQUEUE."""
    try:
        return {int(line.split()[0]) for line in Path(_COUNTERS).read_text().splitlines()}
    except FileNotFoundError:
        return set()


def _open_counters() -> int:
    """The kernel's table of queues, of this thread's network namespace: it stays that one's while it is open."""
    try:
        return os.open(_COUNTERS, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise KernelLacksError("packet hold: the kernel has no NFQUEUE") from error


def _header(size: int, kind: int, flags: int, number: int) -> bytes:
    return _HEADER.pack(size, kind, flags, 1, 0, 0, 0, struct.pack("!H", number))


def _config(number: int, limits: HoldLimits) -> bytes:
    """Bind the queue, and say what is wanted of it, in one message."""
    values = (
        (_CFG_CMD, struct.pack("!BxH", _BIND, 0)),
        (_CFG_PARAMS, struct.pack("!IB", _COPY_BYTES, _COPY_PACKET)),
        (_CFG_QUEUE_MAXLEN, struct.pack("!I", limits.packets + _SLACK)),
        (_CFG_MASK, struct.pack("!I", _F_GSO)),
        (_CFG_FLAGS, struct.pack("!I", _F_GSO)),
    )
    body = b"".join(
        _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value.ljust((len(value) + 3) & ~3, b"\0")
        for kind, value in values
    )
    return _header(_HEADER.size + len(body), _CONFIG, NLM_F_REQUEST | NLM_F_ACK, number) + body


def _parse(message: memoryview) -> HeldPacket | None:
    """Read one message from the kernel; None for an error, which can only be that a verdict came too late."""
    data = bytes(message)  # a view of its own for each attribute takes longer
    if _KIND.unpack_from(data)[0] != _PACKET:
        return None
    # The packet's own header is always the first attribute (nfqnl_build_packet_message).
    offset, end = _HEADER.size, len(data)
    ident, ethertype = _PACKET_HEADER.unpack_from(data, offset + _ATTRIBUTE.size)
    size, payload = 0, b""
    while offset + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if kind == _PAYLOAD:
            payload = data[offset + _ATTRIBUTE.size : offset + length]
        elif kind == _CAP_LEN:
            (size,) = _LENGTH.unpack_from(data, offset + _ATTRIBUTE.size)
        elif length < _ATTRIBUTE.size:
            break
        offset += (length + 3) & ~3
    protocol, port = classify(ethertype, payload)
    return HeldPacket(ident, protocol, size or len(payload), port, payload if protocol == OTHER else b"")
