"""The one door to netlink: a blocking socket that is never waited for.

The kernel works a netlink request off inside `send()`, and has queued its answer when `send()` returns (a dump goes
on inside each `recv()`): there is nothing to await. So the calls here are plain functions that take some tens of
microseconds, fit into a freeze, and run under any event loop. (pyroute2's own asynchronous sockets do not run under
uvloop, which refuses datagram sockets of the family AF_NETLINK.) Messages are built with pyroute2's classes;
netlink's attribute format is read back by `attributes`. Source: kernel Documentation/userspace-api/netlink/intro.rst.
"""

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from .errors import KernelRefusedError, from_errno

NETLINK_ROUTE = 0
NETLINK_SOCK_DIAG = 4
NETLINK_NETFILTER = 12

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800
NLMSG_ERROR = 2
NLMSG_DONE = 3

_NLM_F_ACK_TLVS = 0x200
_NLMSGERR_ATTR_MSG = 1
_SOL_NETLINK = 270
_NETLINK_NO_ENOBUFS = 5
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_HEADER = struct.Struct("=IHHII")
_NUMBER = struct.Struct("=I")
"""The sequence number, at offset 8 of a message."""
_ATTRIBUTE = struct.Struct("=HH")
_ATTRIBUTE_TYPE_MASK = 0x3FFF
_RECEIVE_BYTES = 1 << 16
_ANSWER_TIMEOUT = struct.pack("@ll", 5, 0)
"""struct timeval: the kernel answers within its send(); this is for a kernel that does not answer at all."""
_DUMP_TRIES = 5
_PER_SEND = 64
"""As many errors fit into the smallest usual receive buffer, at about 1 KiB each in the kernel's counting."""
_SO_RCVBUFFORCE = 33


class Message(NamedTuple):
    """One netlink message as received: header fields, and the bytes after the header."""

    type: int
    flags: int
    data: bytes
    """The whole message with its header, as pyroute2's classes want it."""

    @property
    def payload(self) -> bytes:
        """What follows the 16 bytes of header."""
        return self.data[_HEADER.size :]


class Refusal(Exception):
    """The kernel answered a request with an error number. Caught and mapped within netfix: no caller sees it."""

    def __init__(self, number: int, detail: str) -> None:
        super().__init__(number, detail)
        self.number = number
        self.detail = detail


def encode(message: Any, kind: int, flags: int) -> bytes:
    """The bytes of a pyroute2 message; `NLM_F_REQUEST` is implied."""
    message["header"]["type"] = kind
    message["header"]["flags"] = flags | NLM_F_REQUEST
    message["header"]["sequence_number"] = 1
    message.encode()
    return bytes(message.data)


def attributes(data: bytes, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """The attributes (type, value) in `data`, from `offset` on."""
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _ATTRIBUTE_TYPE_MASK, data[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3


class NetlinkSocket:
    """A netlink socket in the network namespace of the thread that makes it. Undo: `close`."""

    def __init__(self, protocol: int, doing: str) -> None:
        """Open it for one netlink protocol; `doing` names the purpose in errors.

        Raises NotPermittedError, KernelLacksError.
        """
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        except OSError as error:
            raise from_errno(error.errno or 0, doing) from error
        try:
            # Not settimeout(): with that, Python waits for the timeout even where MSG_DONTWAIT says not to.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _ANSWER_TIMEOUT)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
            self._socket.bind((0, 0))
        except OSError as error:
            self._socket.close()
            raise from_errno(error.errno or 0, doing) from error
        self._doing = doing

    def request(self, message: bytes) -> list[Message]:
        """Send one message that wants an acknowledgement or is a dump; everything that was answered.

        Raises Refusal with the kernel's error number.
        """
        for _ in range(_DUMP_TRIES):
            self._send(message)
            answers: list[Message] = []
            with contextlib.suppress(InterruptedError):
                while not self._collect(answers):
                    pass
                return answers
        raise KernelRefusedError(f"{self._doing}: the table changed during each of {_DUMP_TRIES} readings")

    def transact(self, batch: bytes) -> None:
        """Send a ready batch whose last message wants an acknowledgement: all of it is done, or nothing.

        Raises Refusal with the first error the kernel named.
        """
        self._send(batch)
        acknowledged = False
        first: Refusal | None = None
        for answer in self._waiting():
            if answer.type == NLMSG_ERROR:
                refusal = _refusal(answer)
                acknowledged = acknowledged or refusal is None
                first = first or refusal
        if first is not None:
            raise first
        if not acknowledged:
            raise KernelRefusedError(f"{self._doing}: the kernel did not acknowledge the change")

    def submit(self, requests: Sequence[bytes]) -> dict[int, Refusal]:
        """Send messages that stand each by itself and want no acknowledgement, many at a time.

        Returns the refusals by index: the kernel tells of every error, and of nothing else.
        """
        refusals = {}
        for start in range(0, len(requests), _PER_SEND):
            chunk = enumerate(requests[start : start + _PER_SEND], start)
            self._send(b"".join(b"".join((one[:8], _NUMBER.pack(number), one[12:])) for number, one in chunk))
            for answer in self._waiting():
                if answer.type == NLMSG_ERROR and (refusal := _refusal(answer)) is not None:
                    refusals[_NUMBER.unpack_from(answer.data, 8)[0]] = refusal
        return refusals

    def _waiting(self) -> Iterator[Message]:
        """What has been answered and not been read yet."""
        while True:
            try:
                data = self._socket.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                raise from_errno(error.errno or 0, self._doing) from error
            yield from messages(data)

    def bear_bursts(self, receive_bytes: int) -> None:
        """Make the receive buffer that large, beyond the system's limit if we may, and lose silently beyond it."""
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, receive_bytes)
        except OSError:  # not permitted in a user namespace, or another number on this architecture
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)

    def fileno(self) -> int:
        """To wait for messages with that the kernel sends by itself."""
        return self._socket.fileno()

    def receive_into(self, buffer: memoryview) -> int:
        """The next message that has come, cut to the buffer: its bytes there, 0 if there is none."""
        try:
            return self._socket.recv_into(buffer, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise from_errno(error.errno or 0, self._doing) from error

    def send(self, data: bytes) -> None:
        """Send messages that want no acknowledgement."""
        self._send(data)

    def _send(self, data: bytes) -> None:
        try:
            self._socket.send(data)
        except OSError as error:
            raise from_errno(error.errno or 0, self._doing) from error

    def _collect(self, answers: list[Message]) -> bool:
        """Read once into `answers`: is this the end? InterruptedError if the table changed under a dump."""
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError as error:
            raise from_errno(errno.ETIMEDOUT, self._doing) from error
        except OSError as error:
            raise from_errno(error.errno or 0, self._doing) from error
        done = False
        for answer in messages(data):
            if answer.flags & NLM_F_DUMP_INTR:
                self._discard()
                raise InterruptedError
            if answer.type == NLMSG_ERROR:
                refusal = _refusal(answer)
                if refusal is not None:
                    raise refusal
                done = True
            elif answer.type == NLMSG_DONE:
                _raise_dump_error(answer)
                done = True
            else:
                answers.append(answer)
        return done

    def _discard(self) -> None:
        """Drop what is left of an interrupted dump."""
        with contextlib.suppress(BlockingIOError):
            while self._socket.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT):
                pass

    def close(self) -> None:
        """Close the socket; idempotent."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def messages(data: bytes) -> Iterator[Message]:
    """The messages in what was received at once."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, _, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size:
            return
        yield Message(kind, flags, data[offset : offset + length])
        offset += (length + 3) & ~3


def _refusal(answer: Message) -> Refusal | None:
    """What an NLMSG_ERROR says: None is an acknowledgement."""
    (number,) = struct.unpack_from("=i", answer.data, _HEADER.size)
    if number == 0:
        return None
    detail = ""
    if answer.flags & _NLM_F_ACK_TLVS:
        # With NETLINK_CAP_ACK only the header of the refused message is repeated before the attributes.
        for kind, value in attributes(answer.data, 2 * _HEADER.size + 4):
            if kind == _NLMSGERR_ATTR_MSG:
                detail = value.rstrip(b"\0").decode(errors="replace")
    return Refusal(-number, detail or os.strerror(-number))


def _raise_dump_error(answer: Message) -> None:
    if len(answer.data) >= _HEADER.size + 4:
        (number,) = struct.unpack_from("=i", answer.data, _HEADER.size)
        if number < 0:
            raise Refusal(-number, os.strerror(-number))
