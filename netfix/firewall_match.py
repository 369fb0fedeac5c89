"""Whether one nftables rule matches a packet of which only some bytes are known. Pure.

The answer has three values: yes, no, perhaps. A rule is a list of expressions that load bytes into registers and
compare them (kernel include/uapi/linux/netfilter/nf_tables.h; libnftnl); what iptables-nft writes has xtables matches
among them. An expression that is not known here matches perhaps, and may accept.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from .netlink import attributes
from .nft_sets import FirewallSet

Bytes = list[int | None]
"""Bytes of which some are not known."""

_REGISTER_BYTES = 64
_ACCEPT, _DROP, _JUMP, _GOTO, _RETURN = 1, 0, -3, -4, -5
_EQ, _NEQ, _LT, _LTE, _GT, _GTE = range(6)
_ORDERED: dict[int, Callable[[bytes, bytes], bool]] = {
    _LT: lambda a, b: a < b,
    _LTE: lambda a, b: a <= b,
    _GT: lambda a, b: a > b,
    _GTE: lambda a, b: a >= b,
}
_INVERTED = 1
CT_NEW = 8
"""`NF_CT_STATE_BIT(IP_CT_NEW)`, as nft's `ct state` and the xtables match `conntrack` have it."""
_XT_CONNTRACK_STATE = 1
_XT_CONNTRACK = struct.Struct("=146xHHH")
"""struct xt_conntrack_mtinfo2 and 3, after addresses, expiry, protocol and ports: what to match, invert, and states."""
_XT_PORTS = struct.Struct("=4H")
_NO_EFFECT = frozenset({"counter", "log", "notrack", "last", "objref"})
_XT_CONTINUES = frozenset({"LOG", "NFLOG", "MARK", "CONNMARK", "CT", "TRACE", "SET"})


class Match(Enum):
    """Whether a rule matches."""

    NO = 0
    PERHAPS = 1
    YES = 2


class Verdict(NamedTuple):
    """What becomes of a packet that a rule matches: `accept`, `drop`, `jump`, `goto` or `return`, and where to."""

    kind: str
    chain: str = ""


@dataclass(frozen=True)
class KnownPacket:
    """What is known of a packet. `meta` and `conntrack` are by nft's keys; `network` and `transport` are headers."""

    transport_protocol: str
    port: int
    meta: Mapping[int, bytes]
    conntrack: Mapping[int, bytes]
    network: Sequence[int | None]
    transport: Sequence[int | None]


class _State:
    """The registers while a rule is evaluated."""

    def __init__(self, packet: KnownPacket, sets: Mapping[str, FirewallSet]) -> None:
        self.packet = packet
        self.sets = sets
        self.match = Match.YES
        self.verdict: Verdict | None = None
        self._bytes: Bytes = [None] * _REGISTER_BYTES

    def load(self, register: int, value: Sequence[int | None]) -> None:
        start = _offset(register)
        padded = [*value, *([0] * (-len(value) % 4))]
        self._bytes[start : start + len(padded)] = padded

    def value(self, register: int, length: int) -> Bytes:
        start = _offset(register)
        return self._bytes[start : start + length]

    def narrow(self, match: Match) -> None:
        self.match = min(self.match, match, key=lambda each: each.value)


def _offset(register: int) -> int:
    """Four registers of 16 bytes, and the same bytes as sixteen of 4 (`NFT_REG_1`, `NFT_REG32_00`)."""
    return (register - 1) * 16 if register < 8 else (register - 8) * 4


def evaluate(expressions: bytes, packet: KnownPacket, sets: Mapping[str, FirewallSet]) -> tuple[Match, Verdict | None]:
    """Does the rule match, and what does it say then? `sets` are those of its table."""
    state = _State(packet, sets)
    for _, element in attributes(expressions):
        parts = dict(attributes(element))
        name = parts.get(1, b"").rstrip(b"\0").decode()
        data = dict(attributes(parts.get(2, b"")))
        handler = _HANDLERS.get(name)
        if handler is not None:
            handler(state, data)
        elif name not in _NO_EFFECT:
            state.narrow(Match.PERHAPS)
            state.verdict = state.verdict or Verdict("accept")
        if state.match is Match.NO:
            return Match.NO, None
    return state.match, state.verdict


def _number(data: Mapping[int, bytes], kind: int, default: int = 0) -> int:
    return int.from_bytes(data[kind], "big", signed=True) if kind in data else default


def _value(data: Mapping[int, bytes], kind: int) -> bytes:
    return dict(attributes(data.get(kind, b""))).get(1, b"")


def verdict_of(nested: bytes) -> Verdict | None:
    """The verdict in the nested attributes of an `NFTA_DATA_VERDICT`; None for one that only goes on."""
    inner = dict(attributes(nested))
    chain = inner.get(2, b"").rstrip(b"\0").decode()
    code = _number(inner, 1)
    kinds = {_ACCEPT: "accept", _DROP: "drop", _JUMP: "jump", _GOTO: "goto", _RETURN: "return"}
    return Verdict(kinds.get(code, "accept"), chain) if code not in (-1, -2) else None


def _meta(state: _State, data: Mapping[int, bytes]) -> None:
    if 1 in data:
        state.load(_number(data, 1), _known(state.packet.meta.get(_number(data, 2)), 16))


def _ct(state: _State, data: Mapping[int, bytes]) -> None:
    if 1 in data:
        state.load(_number(data, 1), _known(state.packet.conntrack.get(_number(data, 2)), 16))


def _known(value: bytes | None, length: int) -> Bytes:
    return [None] * length if value is None else list(value)


def _payload(state: _State, data: Mapping[int, bytes]) -> None:
    if 1 not in data:
        return
    header = {1: state.packet.network, 2: state.packet.transport}.get(_number(data, 2), ())
    offset, length = _number(data, 3), _number(data, 4)
    found = list(header[offset : offset + length])
    state.load(_number(data, 1), [*found, *([None] * (length - len(found)))])


def _bitwise(state: _State, data: Mapping[int, bytes]) -> None:
    length = _number(data, 3)
    mask, xor = _value(data, 4), _value(data, 5)
    value = state.value(_number(data, 1), length)
    if _number(data, 6) != 0 or len(mask) < length or len(xor) < length:
        state.load(_number(data, 2), [None] * length)
        return
    masked = [
        other if not bits else None if byte is None else byte & bits ^ other
        for byte, bits, other in zip(value, mask, xor, strict=False)
    ]
    state.load(_number(data, 2), masked)


def compare(value: Bytes, operation: int, wanted: bytes) -> Match:
    """How bytes compare that are perhaps not all known."""
    if operation in (_EQ, _NEQ):
        differs = any(have is not None and have != want for have, want in zip(value, wanted, strict=False))
        equal = Match.NO if differs else Match.PERHAPS if None in value else Match.YES
        return equal if operation == _EQ else Match(2 - equal.value)
    if None in value or operation not in _ORDERED:
        return Match.PERHAPS
    return Match.YES if _ORDERED[operation](bytes(byte or 0 for byte in value), wanted) else Match.NO


def _cmp(state: _State, data: Mapping[int, bytes]) -> None:
    wanted = _value(data, 3)
    state.narrow(compare(state.value(_number(data, 1), len(wanted)), _number(data, 2), wanted))


def _range(state: _State, data: Mapping[int, bytes]) -> None:
    low, high = _value(data, 3), _value(data, 4)
    value = state.value(_number(data, 1), len(low))
    inside = min(compare(value, _GTE, low), compare(value, _LTE, high), key=lambda each: each.value)
    state.narrow(inside if _number(data, 2) == _EQ else Match(2 - inside.value))


def _lookup(state: _State, data: Mapping[int, bytes]) -> None:
    found = state.sets.get(data.get(1, b"").rstrip(b"\0").decode())
    if found is None:
        state.narrow(Match.PERHAPS)
        state.verdict = state.verdict or (Verdict("accept") if 3 in data else None)
        return
    value = state.value(_number(data, 2), found.key_bytes)
    if 3 in data:
        _look_up_in_map(state, found, value, _number(data, 3))
        return
    inside = Match.PERHAPS if None in value else Match.YES if found.holds(_sure(value)) else Match.NO
    state.narrow(Match(2 - inside.value) if _number(data, 5) & _INVERTED else inside)


def _look_up_in_map(state: _State, found: FirewallSet, value: Bytes, register: int) -> None:
    if None in value:
        state.narrow(Match.PERHAPS)
        state.verdict = Verdict("accept")
        return
    element = found.holds(_sure(value))
    if element is None:
        state.narrow(Match.NO)
    elif register == 0:
        state.verdict = verdict_of(element.verdict)
    else:
        state.load(register, [None] * 16)


def _sure(value: Bytes) -> bytes:
    return bytes(byte for byte in value if byte is not None)


def _immediate(state: _State, data: Mapping[int, bytes]) -> None:
    inner = dict(attributes(data.get(2, b"")))
    if _number(data, 1) == 0:
        state.verdict = verdict_of(inner.get(2, b""))
    else:
        state.load(_number(data, 1), list(inner.get(1, b"")))


def _reject(state: _State, data: Mapping[int, bytes]) -> None:
    state.verdict = Verdict("drop")


def _limit(state: _State, data: Mapping[int, bytes]) -> None:
    state.narrow(Match.PERHAPS)


def _xt_match(state: _State, data: Mapping[int, bytes]) -> None:
    name, info = data.get(1, b"").rstrip(b"\0").decode(), data.get(3, b"")
    if name == "comment":
        return
    match = Match.PERHAPS
    if name in ("tcp", "udp") and len(info) > _XT_PORTS.size:
        match = _xt_ports(state.packet, name, info)
    elif name == "conntrack" and _number(data, 2) in (2, 3) and len(info) >= _XT_CONNTRACK.size:
        flags, inverted, states = _XT_CONNTRACK.unpack_from(info)
        if flags == _XT_CONNTRACK_STATE:
            match = Match.YES if bool(states & CT_NEW) != bool(inverted & _XT_CONNTRACK_STATE) else Match.NO
    state.narrow(match)


def _xt_ports(packet: KnownPacket, name: str, info: bytes) -> Match:
    """struct xt_tcp, struct xt_udp (include/uapi/linux/netfilter/xt_tcpudp.h): sources, destinations, then flags."""
    if name != packet.transport_protocol:
        return Match.NO
    from_low, from_high, low, high = _XT_PORTS.unpack_from(info)
    inverted = info[_XT_PORTS.size + (3 if name == "tcp" else 0)]
    if (low <= packet.port <= high) == bool(inverted & 2):
        return Match.NO
    others = name == "tcp" and any(info[_XT_PORTS.size : _XT_PORTS.size + 2])
    return Match.PERHAPS if others or (from_low, from_high) != (0, 0xFFFF) or inverted & ~2 else Match.YES


def _xt_target(state: _State, data: Mapping[int, bytes]) -> None:
    name = data.get(1, b"").rstrip(b"\0").decode()
    if name == "REJECT":
        state.verdict = Verdict("drop")
    elif name not in _XT_CONTINUES:
        state.narrow(Match.PERHAPS)
        state.verdict = Verdict("accept")


_HANDLERS: dict[str, Callable[[_State, Mapping[int, bytes]], None]] = {
    "meta": _meta,
    "ct": _ct,
    "payload": _payload,
    "bitwise": _bitwise,
    "cmp": _cmp,
    "range": _range,
    "lookup": _lookup,
    "immediate": _immediate,
    "reject": _reject,
    "limit": _limit,
    "match": _xt_match,
    "target": _xt_target,
}
