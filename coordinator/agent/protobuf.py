"""As much of Protocol Buffers (its encoding) as CRIU's requests and images need: hosts have no library for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

#: Wire types: a number, so many bytes. CRIU's messages hardly have others in them.
NUMBER, BYTES = 0, 2


class Field(NamedTuple):
    """A field of a message: its number, its wire type, and where in the message it is."""

    number: int
    kind: int
    value: int  # of a number; of bytes, how many
    begin: int
    content: int  # where the number, or the first of the bytes, is
    end: int


def fields(message: bytes) -> Iterator[Field]:
    """The fields of a message, in their order; what is in a message inside it is not looked at.

    Raises ``ValueError`` or ``IndexError`` for one that cannot be read."""
    at = 0
    while at < len(message):
        begin = at
        tag, at = read_varint(message, at)
        kind = tag & 7
        if kind not in (NUMBER, BYTES):
            raise ValueError(f"a field of wire type {kind}")
        value, behind = read_varint(message, at)
        content, at = (behind, behind + value) if kind == BYTES else (at, behind)
        yield Field(tag >> 3, kind, value, begin, content, at)


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at an offset, and the offset behind it. Raises ``IndexError`` if it does not end."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def as_varint(value: int) -> bytes:
    """A number as it is written; it is not negative."""
    digits = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes((*(each | 0x80 for each in digits[:-1]), digits[-1]))
