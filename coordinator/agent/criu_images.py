"""The frame of CRIU's images (criu/include/magic.h, criu/protobuf.c): two magic numbers, then messages, each behind its
length of 32 bits."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

_COMMON_MAGIC = 0x54564319
_MAGICS = struct.Struct("=II")
_LENGTH = struct.Struct("=I")


def messages(image: bytes, magic: int) -> Iterator[bytes]:
    """The messages of an image of a kind. Raises ``ValueError`` if it is none of that kind, or where it breaks off."""
    if image[: _MAGICS.size] != _MAGICS.pack(_COMMON_MAGIC, magic):
        raise ValueError("unknown magic numbers")
    at = _MAGICS.size
    while at < len(image):
        if at + _LENGTH.size > len(image):
            raise ValueError("it ends in a message's length")
        (length,) = _LENGTH.unpack_from(image, at)
        at += _LENGTH.size + length
        if at > len(image):
            raise ValueError("it ends in a message")
        yield image[at - length : at]


def image_of(parts: Iterable[bytes], magic: int) -> bytes:
    """The image of a kind with these messages."""
    framed = (_LENGTH.pack(len(part)) + part for part in parts)
    return _MAGICS.pack(_COMMON_MAGIC, magic) + b"".join(framed)
