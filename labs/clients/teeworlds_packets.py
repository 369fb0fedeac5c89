"""The packets of Teeworlds 0.7, as far as a scripted player needs them. Does no I/O.

Source: Teeworlds' network.h, network_conn.cpp, network_token.cpp, packer.cpp, huffman.cpp and protocol.h. A packet is a
header and, in it, either one control message or chunks, each with a message. A vital chunk is numbered and
acknowledged; others are sent once. A server compresses what gets shorter by it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

CONTROL, COMPRESSED = 1, 4
"""Flags of a packet."""

CONNECT, ACCEPT, CLOSE, TOKEN = 1, 2, 4, 5
"""Control messages."""

VITAL = 1
"""Flag of a chunk."""

NO_TOKEN = 0xFFFFFFFF
REQUEST_BYTES = 512
"""NET_TOKENREQUEST_DATASIZE: who asks for a token sends as much, so that nobody can have others flooded."""

SEQUENCE = 1 << 10
_HEADER = struct.Struct(">BBBI")

_LENGTHS = (
    "57cccccccc99aa9aa8abcc9845aa989cccccccc9ddccca9999bcccccdd989aa9aa7999979bccccddccccca97abcc9999accddc9959989c"
    "cbcccc99999aa7999acdffecc889aa997bddca99addddcc9aa998bcddbcc976ccbbb99ccddca789aa78cddddca976aaabbbeedcbbddddd"
    "ddda89bba6bcddbbaaaddcdeecabbbbaabb81"
)
_VALUES = (
    "8018e5d4f5ee743acb79b41b4dad249358b047727139b21401088b54b849b1e8e1efebd77ddeddae7a63fd38eaab16988c2c3d6d5de373"
    "3b6766be0ea5a74c218f43099282552053bad86135f6e0f17ffb6564cac49f9e124634c7c219bc411748d1cd5ee4dba08e021a2aff863f"
    "f459cfc1f3d0ac9c968a2745990c1cb62595375a77f8d6cc401e9a4abf134b1057e7dcfea184aa44605f6b6a5bf2884233a8262956d370"
    "5c9bc5c0220a94edd94eb5979011d5d23efcdf231d03a62fa92806c96f627c75c32da4050dbd2e1fb9b7506c7efaceb387da7be9e26968"
    "786e30070f85bba30452c6ec3c899d31a232f9f7c83676f0e615af51918d812b834f0b00"
)
_END_OF_DATA = 130
"""The code that packets are compressed with: the length of each of its words (a hexadecimal digit) in their order, and
the bytes that they stand for; the word of that index stands for the end."""


class ProtocolError(Exception):
    """A packet that the protocol does not have."""


@dataclass(frozen=True)
class Packet:
    """A packet, its content not compressed any more. `token`: that of the side it is for."""

    flags: int
    acknowledged: int
    chunks: int
    token: int
    content: bytes

    def encoded(self) -> bytes:
        head = self.flags << 2 | self.acknowledged >> 8, self.acknowledged & 0xFF, self.chunks, self.token
        return _HEADER.pack(*head) + self.content


def opened(data: bytes) -> Packet:
    """Take a packet apart."""
    if len(data) < _HEADER.size:
        raise ProtocolError(f"a packet of {len(data)} bytes")
    first, low, chunks, token = _HEADER.unpack_from(data)
    flags, content = first >> 2, data[_HEADER.size :]
    return Packet(flags, (first & 3) << 8 | low, chunks, token, expanded(content) if flags & COMPRESSED else content)


def control(kind: int, token: int, ours: int | None = None) -> bytes:
    """A packet with a control message; with `ours`, our own token goes with it."""
    content = bytes([kind]) + (b"" if ours is None else ours.to_bytes(4, "big").ljust(REQUEST_BYTES, b"\0"))
    return Packet(CONTROL, 0, 0, token, content).encoded()


def token_in(packet: Packet) -> int:
    """The other side's own token, in its control message."""
    return int.from_bytes(packet.content[1:5], "big")


def chunk(message: bytes, sequence: int | None = None) -> bytes:
    """A chunk; with a number in the sequence, a vital one."""
    size = len(message)
    if sequence is None:
        return bytes([size >> 6, size & 63]) + message
    return bytes([VITAL << 6 | size >> 6, (sequence >> 2) & 0xC0 | size & 63, sequence & 0xFF]) + message


def chunks(packet: Packet) -> Iterator[tuple[int | None, bytes]]:
    """The chunks of a packet: their numbers, where they are vital, and messages."""
    data = packet.content
    for _ in range(packet.chunks):
        if len(data) < 3:
            raise ProtocolError(f"a chunk that ends early: {data.hex()}")
        size, sequence, start = (data[0] & 63) << 6 | data[1] & 63, None, 2
        if data[0] >> 6 & VITAL:
            sequence, start = (data[1] & 0xC0) << 2 | data[2], 3
        yield sequence, data[start : start + size]
        data = data[start + size :]


def number(value: int) -> bytes:
    """A number of variable length: six bits and the sign, then seven bits a byte, the lowest first."""
    sign, value = (0x40, ~value) if value < 0 else (0, value)
    packed = [sign | value & 63]
    value >>= 6
    while value:
        packed[-1] |= 0x80
        packed.append(value & 127)
        value >>= 7
    return bytes(packed)


def numbers(data: bytes) -> Iterator[int]:
    """The numbers at the beginning of a message, as many as are asked for."""
    rest = iter(data)
    for first in rest:
        value, shift, last = first & 63, 6, first
        while last & 0x80:
            last = next(rest, 0)
            value, shift = value | (last & 127) << shift, shift + 7
        yield ~value if first & 0x40 else value


def text(value: str) -> bytes:
    return value.encode() + b"\0"


def _words() -> dict[tuple[int, int], int]:
    """What each word of the code stands for, by its length and its bits; -1 is the end."""
    values = [*bytes.fromhex(_VALUES)]
    values.insert(_END_OF_DATA, -1)
    words, word, last = {}, -1, 0
    for digit, value in zip(_LENGTHS, values, strict=True):
        length = int(digit, 16)
        word += 1
        word = word << length - last if length >= last else word >> last - length
        words[length, word], last = value, length
    return words


_WORDS = _words()


def expanded(data: bytes) -> bytes:
    """What was compressed to that; the first bit of a word is the lowest of a byte."""
    found, length, word = bytearray(), 0, 0
    for byte in data:
        for shift in range(8):
            length, word = length + 1, word << 1 | byte >> shift & 1
            value = _WORDS.get((length, word))
            if value == -1:
                return bytes(found)
            if value is not None:
                found.append(value)
                length, word = 0, 0
    raise ProtocolError(f"compressed data without an end: {data.hex()}")
