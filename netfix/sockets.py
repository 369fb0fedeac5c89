"""The socket inventory: which TCP and UDP sockets there are in this network namespace, and to whom they belong.

Read through sock_diag (kernel include/uapi/linux/inet_diag.h) and parsed with struct: six times as fast as pyroute2's
DiagSocket, which moreover cannot tell an error from a socket (its MarshalDiag has the error type turned off). A service
may have thousands of connections.
"""

import errno
import ipaddress
import re
import socket
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from .diag_filter import local_address_is
from .errors import from_errno
from .netlink import NETLINK_SOCK_DIAG, NLM_F_DUMP, NLM_F_REQUEST, Message, NetlinkSocket, Refusal, attributes
from .unicast import parse_address

_SOCK_DIAG_BY_FAMILY, _TCPDIAG_GETSOCK = 20, 18
"""The older of the two is the only one with which TCP's sockets of both families come from one walk. It is the walk
that costs: through a table with those of all network namespaces, and all that are in TIME_WAIT."""
_FAMILIES = {2: "ipv4", 10: "ipv6"}
_TCP, _UDP = 6, 17
_PROTOCOLS = {_TCP: "tcp", _UDP: "udp"}
_ALL_STATES = 0xFFFFFFFF
_PENDING_STATES = 0x1FBE
"""All of `_TCP_STATES` but TIME_WAIT and 13, for which the kernel goes through another table."""
_INET_DIAG_INFO = 2
"""Asked for also because INET_DIAG_ULP_INFO comes only with it."""
_TCP_INFO_UNSENT = struct.Struct("=144xI")
"""tcpi_notsent_bytes (include/uapi/linux/tcp.h, Linux >= 4.6)."""
_INET_DIAG_SKV6ONLY, _INET_DIAG_ULP_INFO = 11, 19
_INET_ULP_INFO_NAME = 1
_HEADER = struct.Struct("=IHHII")
_REQUEST, _TCP_REQUEST = struct.Struct("=BBBxI48x"), struct.Struct("=xxxB48xIxxxx")
_ANSWER = struct.Struct("=BBBB2s2s16s16sI8x4xIIII")
_QUEUES = struct.Struct("=xB54xIIxxxxI")
"""Of the same: state, both queues, inode."""
_MAPPED = bytes(10) + b"\xff\xff"
_INODE = re.compile(r"socket:\[(\d+)\]")

_TCP_STATES = {
    # include/net/tcp_states.h; 12 is a request on its way, 13 a bound socket that is neither connected nor listening
    1: "ESTABLISHED",
    2: "SYN_SENT",
    3: "SYN_RECV",
    4: "FIN_WAIT1",
    5: "FIN_WAIT2",
    6: "TIME_WAIT",
    7: "CLOSE",
    8: "CLOSE_WAIT",
    9: "LAST_ACK",
    10: "LISTEN",
    11: "CLOSING",
    12: "SYN_RECV",
    13: "BOUND",
}
_UDP_STATES = {1: "ESTABLISHED", 7: "UNCONNECTED"}
_CLASSES = {
    "LISTEN": "listening",
    "CLOSE": "unconnected",
    "BOUND": "unconnected",
    "UNCONNECTED": "unconnected",
    "TIME_WAIT": "",
}
_WILDCARDS = (ipaddress.IPv4Address(0), ipaddress.IPv6Address(0))
_HANDSHAKE, _LAST_WORDS = (3, 12), (4, 9, 11)
_CLOSING_STATES = sum(1 << state for state in _LAST_WORDS)


@dataclass(frozen=True, slots=True)
class SocketRecord:
    """One socket as the kernel reports it.

    `family`: `ipv4` or `ipv6`; a connection of an IPv6 socket with an IPv4 peer is `ipv4` here, with `mapped` set.
    `protocol`: `tcp` or `udp`. `state`: TCP's states as in /proc/net/tcp (`ESTABLISHED`, `LISTEN`, `TIME_WAIT`, …)
    and for UDP `ESTABLISHED` (connected) or `UNCONNECTED`. `inode`: 0 for a socket that belongs to no process
    (TIME_WAIT, SYN_RECV, closed by its process). `receive_queue_bytes` and `send_queue_bytes`: not read yet, and not
    acknowledged yet; of a *listening* socket they are the number of connections waiting to be accepted, and the most
    there may be. `unsent_bytes`: what of the send queue of a TCP socket has not been sent at all. `device`: the
    interface it is bound to (SO_BINDTODEVICE). `ulp`: what is between TCP and the service, `mptcp` or `tls`; the kernel
    tells only root.
    """

    family: str
    protocol: str
    state: str
    local: str
    local_port: int
    remote: str
    remote_port: int
    inode: int
    receive_queue_bytes: int
    send_queue_bytes: int
    mapped: bool = False
    v6only: bool = False
    device: str = ""
    ulp: str = ""
    unsent_bytes: int = 0


class Difference(NamedTuple):
    """What a move changed: sockets that were there before and are not now, and the other way round."""

    lost: tuple[SocketRecord, ...]
    new: tuple[SocketRecord, ...]


class SocketInventory(Protocol):
    """The TCP and UDP sockets of one network namespace."""

    async def sockets(self) -> list[SocketRecord]:
        """All of them, as they are now: not one instant's picture if they change meanwhile. Raises NetfixError."""

    async def pending(self, addresses: Sequence[str]) -> list[SocketRecord]:
        """Those on the addresses, or on all addresses, in which something waits (`is_pending`). Raises NetfixError,
        InvalidAddressError.

        Measured (Linux 6.18, 2 cores), nothing pending: 0.4 ms with 20 connections, 2.7 ms with 1000, 15 ms with 5000.
        """

    def close(self) -> None:
        """Let go of the netlink socket; idempotent."""


# --- pure ------------------------------------------------------------------------------------------------------------


def of_addresses(
    records: Iterable[SocketRecord], addresses: Sequence[str], *, wildcard: bool = False
) -> list[SocketRecord]:
    """The sockets whose local end is one of the addresses.

    With `wildcard`, those too that are bound to all addresses of a family among them (`0.0.0.0`; `::`, which takes in
    IPv4 unless it is v6only). Raises InvalidAddressError.
    """
    parsed = [parse_address(address) for address in addresses]
    wanted = {str(address) for address in parsed}
    versions = {address.version for address in parsed}

    def is_wildcard(record: SocketRecord) -> bool:
        if record.local == "0.0.0.0":
            return 4 in versions
        return record.local == "::" and (6 in versions or (4 in versions and not record.v6only))

    return [record for record in records if record.local in wanted or (wildcard and is_wildcard(record))]


def owned_by(records: Iterable[SocketRecord], inodes: Iterable[int]) -> list[SocketRecord]:
    """The sockets with one of these inodes (see `socket_inodes`)."""
    wanted = set(inodes) - {0}
    return [record for record in records if record.inode in wanted]


def is_pending(record: SocketRecord) -> bool:
    """Whether something waits in it: what is not read or not accepted yet, a handshake that is not finished, or the
    last words of a connection that no process has any more."""
    closing = record.protocol == "tcp" and record.state in ("FIN_WAIT1", "LAST_ACK", "CLOSING") and not record.inode
    return record.receive_queue_bytes > 0 or record.state == "SYN_RECV" or closing


def state_class(record: SocketRecord) -> str:
    """`listening`, `connected`, `unconnected`, or empty for TIME_WAIT, which no process has.

    All states of a connection are one class: that a peer closes its end during a move changes the state and loses
    nothing.
    """
    return _CLASSES.get(record.state, "connected")


def difference(before: Iterable[SocketRecord], after: Iterable[SocketRecord]) -> Difference:
    """Compare two inventories by protocol, both ends and state class; equal sockets (SO_REUSEPORT) are counted.

    TIME_WAIT is left out on both sides.
    """

    def key(record: SocketRecord) -> tuple[object, ...]:
        ends = (record.local, record.local_port, record.remote, record.remote_port)
        return (record.protocol, *ends, state_class(record))

    def beyond(records: Sequence[SocketRecord], others: Sequence[SocketRecord]) -> tuple[SocketRecord, ...]:
        left = Counter(map(key, others))
        found = []
        for record in records:
            if left[key(record)] > 0:
                left[key(record)] -= 1
            else:
                found.append(record)
        return tuple(found)

    old = [record for record in before if state_class(record)]
    new = [record for record in after if state_class(record)]
    return Difference(lost=beyond(old, new), new=beyond(new, old))


def socket_inodes(pids: Iterable[int], proc: Path = Path("/proc")) -> set[int]:
    """The inodes of all sockets that these processes have open. A process that has ended meanwhile has none.

    Raises NotPermittedError for another user's process without CAP_SYS_PTRACE.
    """
    found: set[int] = set()
    for pid in pids:
        try:
            descriptors = list((proc / str(pid) / "fd").iterdir())
        except (FileNotFoundError, ProcessLookupError):
            continue
        except OSError as error:
            raise from_errno(error.errno or 0, f"reading the open files of process {pid}") from error
        for descriptor in descriptors:
            try:
                match = _INODE.fullmatch(str(descriptor.readlink()))
            except (FileNotFoundError, ProcessLookupError):
                continue  # closed meanwhile
            except OSError as error:
                raise from_errno(error.errno or 0, f"reading the open files of process {pid}") from error
            if match:
                found.add(int(match[1]))
    return found


# --- the real one, and the fake --------------------------------------------------------------------------------------


class DiagSocketInventory:
    """The sockets in the network namespace of the thread that makes it. See `SocketInventory`."""

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_SOCK_DIAG, "reading sockets")

    async def sockets(self) -> list[SocketRecord]:
        udp = (answer for family in _FAMILIES for answer in self._udp(family))
        return [_record(each, _TCP) for each in self._tcp()] + [_record(each, _UDP) for each in udp]

    async def pending(self, addresses: Sequence[str]) -> list[SocketRecord]:
        where = local_address_is([*map(parse_address, addresses), *_WILDCARDS])
        tcp = self._tcp(states=_PENDING_STATES, where=where, info=False)
        if any(_has_last_words(answer) for answer in tcp):  # how much of them is unsent, TCP_INFO tells
            tcp = [answer for answer in tcp if not _has_last_words(answer)]
            tcp += self._tcp(states=_CLOSING_STATES, where=where)
        udp = (answer for family in _FAMILIES for answer in self._udp(family, where=where))
        found = [_record(each, _TCP) for each in tcp if _waits(each)]
        found += [_record(each, _UDP) for each in udp if _waits(each)]
        return of_addresses(filter(is_pending, found), addresses, wildcard=True)

    def _tcp(self, *, states: int = _ALL_STATES, where: bytes = b"", info: bool = True) -> list[Message]:
        extensions = 1 << (_INET_DIAG_INFO - 1) if info else 0
        return self._dump(_TCPDIAG_GETSOCK, _TCP_REQUEST.pack(extensions, states) + where)

    def _udp(self, family: int, *, where: bytes = b"") -> list[Message]:
        body = _REQUEST.pack(family, _UDP, 0, _ALL_STATES) + where
        return self._dump(_SOCK_DIAG_BY_FAMILY, body, may_be_missing=family != socket.AF_INET)

    def _dump(self, kind: int, body: bytes, *, may_be_missing: bool = False) -> list[Message]:
        header = _HEADER.pack(_HEADER.size + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, 1, 0)
        try:
            return self._netlink.request(header + body)
        except Refusal as refusal:
            if refusal.number == errno.ENOENT and may_be_missing:
                return []  # a kernel without IPv6
            raise from_errno(refusal.number, "reading sockets", refusal.detail) from refusal

    def close(self) -> None:
        self._netlink.close()


def _record(answer: Message, protocol: int) -> SocketRecord:
    """Read an inet_diag_msg."""
    family, state, _, _, local_port, remote_port, local, remote, device, receive, send, _, inode = _ANSWER.unpack_from(
        answer.data, _HEADER.size
    )
    mapped = family == 10 and local.startswith(_MAPPED)
    states = _TCP_STATES if protocol == _TCP else _UDP_STATES
    only, ulp, unsent = False, "", 0
    for kind, value in attributes(answer.data, _HEADER.size + _ANSWER.size):
        if kind == _INET_DIAG_SKV6ONLY:
            only = family == 10 and value[:1] == b"\x01"
        elif kind == _INET_DIAG_INFO and len(value) >= _TCP_INFO_UNSENT.size:
            (unsent,) = _TCP_INFO_UNSENT.unpack_from(value)
        elif kind == _INET_DIAG_ULP_INFO:
            ulp = next((_zero_ended(text) for inner, text in attributes(value) if inner == _INET_ULP_INFO_NAME), "")
    return SocketRecord(
        family="ipv4" if mapped else _FAMILIES[family],
        protocol=_PROTOCOLS[protocol],
        state=states.get(state, f"STATE_{state}"),
        local=_text(family, local),
        local_port=int.from_bytes(local_port, "big"),
        remote=_text(family, remote),
        remote_port=int.from_bytes(remote_port, "big"),
        inode=inode,
        receive_queue_bytes=receive,
        send_queue_bytes=send,
        mapped=mapped,
        v6only=only,
        device=_device_name(device) if device else "",
        ulp=ulp,
        unsent_bytes=unsent,
    )


def _has_last_words(answer: Message) -> bool:
    state, _, _, inode = _QUEUES.unpack_from(answer.data, _HEADER.size)
    return not inode and state in _LAST_WORDS


def _waits(answer: Message) -> bool:
    """`is_pending`, without reading all of it."""
    state, received, _, inode = _QUEUES.unpack_from(answer.data, _HEADER.size)
    return received > 0 or state in _HANDSHAKE or (not inode and state in _LAST_WORDS)


def _zero_ended(text: bytes) -> str:
    return text.rstrip(b"\0").decode(errors="replace")


def _device_name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"#{index}"


def _text(family: int, raw: bytes) -> str:
    if family == 2:
        return str(ipaddress.IPv4Address(raw[:4]))
    if raw.startswith(_MAPPED):
        return str(ipaddress.IPv4Address(raw[12:]))
    return str(ipaddress.IPv6Address(raw))


class FakeSocketInventory:
    """An inventory in memory, for tests: `records` is what there is. `fail_next` is raised by the next reading."""

    def __init__(self, records: Iterable[SocketRecord] = ()) -> None:
        self.records = list(records)
        self.fail_next: Exception | None = None
        self.closed = False

    async def sockets(self) -> list[SocketRecord]:
        failure, self.fail_next = self.fail_next, None
        if failure is not None:
            raise failure
        return list(self.records)

    async def pending(self, addresses: Sequence[str]) -> list[SocketRecord]:
        return of_addresses(filter(is_pending, await self.sockets()), addresses, wildcard=True)

    def close(self) -> None:
        self.closed = True
