"""Entries of the connection table as ctnetlink says them: messages made and read with struct.

pyroute2's classes take 0.4 ms for one entry, and a service may have thousands. Source: kernel
include/uapi/linux/netfilter/nfnetlink_conntrack.h, net/netfilter/nf_conntrack_netlink.c.
"""

import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache

from .conntrack_entry import ASSURED, DST_NAT, SEEN_REPLY, SETTABLE, SRC_NAT, TCP, UDP, Connection, Flow, TcpInfo
from .netlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, Message, attributes, messages

_SUBSYSTEM = 1
_NEW, _GET, _DELETE, _STATISTICS = (_SUBSYSTEM << 8 | kind for kind in (0, 1, 2, 5))
_HEADER = struct.Struct("=IHHIIBBH")
"""nlmsghdr and nfgenmsg."""
_NFGEN_BYTES = 4
_LEAD = struct.Struct("=HH")
_NESTED = 0x8000

_ORIGINAL, _REPLY, _STATUS, _PROTOINFO, _NAT_SRC, _TIMEOUT, _MARK, _NAT_DST = 1, 2, 3, 4, 6, 7, 8, 13
_ZONE, _FILTER = 18, 25
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_PROTO_NUM, _PROTO_SOURCE_PORT, _PROTO_DESTINATION_PORT = 1, 2, 3
_PROTOINFO_TCP = 1
_TCP_STATE, _TCP_SCALE_ORIGINAL, _TCP_SCALE_REPLY, _TCP_FLAGS_ORIGINAL, _TCP_FLAGS_REPLY = 1, 2, 3, 4, 5
_NAT_PROTO, _PORT_LEAST, _PORT_MOST = 3, 1, 2
_FILTER_ORIGINAL, _FILTER_REPLY = 1, 2
_FILTER_SOURCE, _FILTER_DESTINATION = 1, 2
_ENTRIES = 1

_IP_KINDS = {socket.AF_INET: (1, 2), socket.AF_INET6: (3, 4)}
_NAT_KINDS = {socket.AF_INET: (1, 2), socket.AF_INET6: (4, 5)}


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value.ljust(len(value) + 3 & ~3, b"\0")


def _nest(kind: int, *inner: bytes) -> bytes:
    return _attribute(kind | _NESTED, b"".join(inner))


def _family(flow: Flow) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in flow.source else socket.AF_INET


_TUPLES = {
    family: struct.Struct(f"=HH HH HH{size}s HH{size}s HH HHB3x HHH2x HHH2x")
    for family, size in ((socket.AF_INET, 4), (socket.AF_INET6, 16))
}
"""A CTA_TUPLE with both addresses, protocol and ports, as the kernel always lays it out."""
_IP_BYTES = {52: socket.AF_INET, 76: socket.AF_INET6}
"""The family by the length of a tuple; those of protocols without ports have others."""


def _tuple(kind: int, flow: Flow, protocol: int) -> bytes:
    family = _family(flow)
    layout, (source, destination) = _TUPLES[family], _IP_KINDS[family]
    ends = [socket.inet_pton(family, each) for each in (flow.source, flow.destination)]
    ip = len(ends[0]) + 4
    ports = (6, _PROTO_SOURCE_PORT, socket.htons(flow.source_port)), (6, _PROTO_DESTINATION_PORT)
    return layout.pack(
        *(layout.size, kind | _NESTED, 4 + 2 * ip, _TUPLE_IP | _NESTED),
        *(ip, source, ends[0], ip, destination, ends[1]),
        *(28, _TUPLE_PROTO | _NESTED, 5, _PROTO_NUM, protocol),
        *(*ports[0], *ports[1], socket.htons(flow.destination_port)),
    )


def _protoinfo(tcp: TcpInfo) -> bytes:
    def byte(kind: int, value: int) -> bytes:
        return _attribute(kind, bytes((value,)))

    def flags(kind: int, value: int) -> bytes:  # struct nf_ct_tcp_flags: values, and which of them are meant
        return _attribute(kind, bytes((value, SETTABLE)))

    return _nest(
        _PROTOINFO,
        _nest(
            _PROTOINFO_TCP,
            byte(_TCP_STATE, tcp.state),
            byte(_TCP_SCALE_ORIGINAL, tcp.scale_original),
            byte(_TCP_SCALE_REPLY, tcp.scale_reply),
            flags(_TCP_FLAGS_ORIGINAL, tcp.flags_original),
            flags(_TCP_FLAGS_REPLY, tcp.flags_reply),
        ),
    )


def _nat(kind: int, address: str, port: int) -> bytes:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    packed, wire_port = socket.inet_pton(family, address), port.to_bytes(2, "big")
    ends = [_attribute(each, packed) for each in _NAT_KINDS[family]]
    return _nest(kind, *ends, _nest(_NAT_PROTO, *(_attribute(each, wire_port) for each in (_PORT_LEAST, _PORT_MOST))))


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, value.to_bytes(4, "big"))


def _values(connection: Connection) -> list[bytes]:
    """What can be changed of an entry that is there, too."""
    values = [_number(_STATUS, connection.status), _number(_TIMEOUT, connection.timeout_s)]
    values.append(_number(_MARK, connection.mark))
    return values if connection.tcp is None else [*values, _protoinfo(connection.tcp)]


def _name(connection: Connection) -> list[bytes]:
    zone = [_attribute(_ZONE, connection.zone.to_bytes(2, "big"))] if connection.zone else []
    return [_tuple(_ORIGINAL, connection.original, connection.protocol), *zone]


def _message(kind: int, flags: int, family: int, parts: Iterable[bytes]) -> bytes:
    body = b"".join(parts)
    return _HEADER.pack(_HEADER.size + len(body), kind, flags | NLM_F_REQUEST, 1, 0, family, 0, 0) + body


def creation(connection: Connection) -> bytes:
    """The kernel works out the direction of the answers by itself from what is translated to what."""
    original, reply, name = connection.original, connection.reply, _name(connection)
    name.append(_tuple(_REPLY, original.reversed, connection.protocol))
    if connection.status & DST_NAT:
        name.append(_nat(_NAT_DST, reply.source, reply.source_port))
    if connection.status & SRC_NAT:
        name.append(_nat(_NAT_SRC, reply.destination, reply.destination_port))
    return _message(_NEW, NLM_F_CREATE | NLM_F_EXCL, _family(original), [*name, *_values(connection)])


def update(connection: Connection) -> bytes:
    """Bits that an entry has cannot be taken away from it (EBUSY)."""
    lasting = replace(connection, status=connection.status | SEEN_REPLY | ASSURED)
    return _message(_NEW, NLM_F_CREATE, _family(connection.original), [*_name(connection), *_values(lasting)])


def deletion(connection: Connection) -> bytes:
    return _message(_DELETE, 0, _family(connection.original), _name(connection))


def to_bytes(connections: Iterable[Connection]) -> bytes:
    """Entries in the form in which the kernel tells of them, one message after the other."""
    return b"".join(
        _message(
            _NEW,
            0,
            _family(each.original),
            [*_name(each), _tuple(_REPLY, each.reply, each.protocol), *_values(each)],
        )
        for each in connections
    )


def from_bytes(data: bytes) -> list[Connection]:
    """The way back of `to_bytes`; what is no entry of TCP or UDP is left out."""
    return list(parsed(messages(data), set()))


def parsed(answers: Iterable[Message], seen: set[bytes]) -> Iterator[Connection]:
    """The entries among what the kernel answered; one whose name is in `seen` is left out, and the others added."""
    for answer in answers:
        name = _identity(answer.data)
        if answer.type == _NEW and name not in seen:
            seen.add(name)
            if (connection := _connection(answer)) is not None:
                yield connection


def _identity(data: bytes) -> bytes:
    """The first attributes of an entry: both directions, and the zone if it has one (ctnetlink_fill_info)."""
    end = _HEADER.size
    for kinds in ((_ORIGINAL,), (_REPLY,), (_ZONE,)):
        if end + 4 <= len(data):
            length, kind = _LEAD.unpack_from(data, end)
            end += (length + 3 & ~3) if kind & ~_NESTED in kinds else 0
    return data[_HEADER.size : end]


def _connection(answer: Message) -> Connection | None:
    values = dict(attributes(answer.payload, _NFGEN_BYTES))
    protocol, original = _flow(values.get(_ORIGINAL, b""))
    _, reply = _flow(values.get(_REPLY, b""))
    if protocol not in (TCP, UDP) or original is None or reply is None:
        return None
    return Connection(
        protocol,
        original,
        reply,
        status=int.from_bytes(values.get(_STATUS, b""), "big"),
        timeout_s=int.from_bytes(values.get(_TIMEOUT, b""), "big"),
        mark=int.from_bytes(values.get(_MARK, b""), "big"),
        zone=int.from_bytes(values.get(_ZONE, b""), "big"),
        tcp=_tcp_info(values.get(_PROTOINFO, b"")) if protocol == TCP else None,
    )


def _flow(data: bytes) -> tuple[int, Flow | None]:
    """Protocol and flow; no flow for a protocol without ports. `data` is a tuple without its own header."""
    family = _IP_BYTES.get(len(data) + 4)
    if family is None:
        return 0, None
    values = _TUPLES[family].unpack(bytes(4) + data)
    source, destination, protocol = values[6], values[9], values[14]
    if (values[16], values[19]) != (_PROTO_SOURCE_PORT, _PROTO_DESTINATION_PORT):
        return protocol, None
    ports = socket.ntohs(values[17]), socket.ntohs(values[20])
    return protocol, Flow(socket.inet_ntop(family, source), ports[0], socket.inet_ntop(family, destination), ports[1])


@lru_cache(maxsize=256)
def _tcp_info(data: bytes) -> TcpInfo:
    info = dict(attributes(dict(attributes(data)).get(_PROTOINFO_TCP, b"")))
    kinds = (_TCP_STATE, _TCP_SCALE_ORIGINAL, _TCP_SCALE_REPLY, _TCP_FLAGS_ORIGINAL, _TCP_FLAGS_REPLY)
    return TcpInfo(*(info.get(kind, b"\0")[0] for kind in kinds))


def questions(address: str) -> list[bytes]:
    """Dumps that together have every entry that names the address. The kernel picks them out; before Linux 5.8 it
    answers each with the whole table."""
    family = _family(Flow(address, 0, address, 0))
    kinds, packed = _IP_KINDS[family], socket.inet_pton(family, address)
    found = []
    for direction, chosen in ((_ORIGINAL, _FILTER_ORIGINAL), (_REPLY, _FILTER_REPLY)):
        for kind, flag in zip(kinds, (_FILTER_SOURCE, _FILTER_DESTINATION), strict=True):
            end = _nest(direction, _nest(_TUPLE_IP, _attribute(kind, packed)))
            both = (_FILTER_ORIGINAL, _FILTER_REPLY)
            flags = [_attribute(each, struct.pack("=I", flag if each == chosen else 0)) for each in both]
            found.append(_message(_GET, NLM_F_DUMP, family, [end, _nest(_FILTER, *flags)]))
    return found


STATISTICS = _message(_STATISTICS, NLM_F_ACK, 0, [])
"""Asks how many entries there are."""


def entries(answer: Message) -> int:
    """The number in the answer to `STATISTICS`."""
    return int.from_bytes(dict(attributes(answer.payload, _NFGEN_BYTES)).get(_ENTRIES, b""), "big")
