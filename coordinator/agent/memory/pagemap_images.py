"""Which pages CRIU's images leave to whoever fills memory in: the lazy ones.

The format (CRIU, images/pagemap.proto, criu/include/magic.h): two magic numbers, then messages behind a 32-bit length:
a head with the number of the pages image, and entries sorted by address. All fields are varints, so this needs no
protobuf library on a host.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from coordinator.errors import RestoreFailed

_MAGICS = struct.pack("=II", 0x54564319, 0x56084025)
_LENGTH = struct.Struct("=I")
#: Where the messages begin.
_MESSAGES = len(_MAGICS)
_PAGES_IMAGE = 1
_ADDRESS, _COMPAT_PAGES, _FLAGS, _PAGES = 1, 2, 4, 5
LAZY, PRESENT = 1 << 1, 1 << 2


@dataclass(frozen=True, slots=True)
class Entry:
    """A run of pages: address of the first, how many, LAZY, PRESENT, …"""

    start: int
    pages: int
    flags: int


#: The head of a page map is within so many bytes.
HEAD_BYTES = 64


def process_of(name: str) -> int | None:
    """The process whose page map an image of that name is, if it is one: not of shared memory."""
    number = name.removeprefix("pagemap-").removesuffix(".img")
    return int(number) if number.isdigit() and name == f"pagemap-{number}.img" else None


def pages_image(head: bytes) -> str | None:
    """The name of the image with the pages of a page map that begins like that; ``None`` for one we do not know."""
    try:
        end = _MESSAGES + _LENGTH.size + _LENGTH.unpack_from(head, _MESSAGES)[0]
        return f"pages-{parse(head[:end], '')[0]}.img"
    except (RestoreFailed, struct.error, KeyError, IndexError):
        return None


def lazy_pages(images: Path) -> dict[int, list[Entry]]:
    """For each process its runs of lazy pages.

    Raises ``RestoreFailed`` for a page map it does not know."""
    found: dict[int, list[Entry]] = {}
    for path in images.glob("pagemap-*.img"):
        if (process := process_of(path.name)) is not None:
            _, entries = parse(path.read_bytes(), path.name)
            found[process] = [entry for entry in entries if entry.flags & (LAZY | PRESENT) == LAZY]
    return found


def parse(data: bytes, name: str) -> tuple[int, list[Entry]]:
    """The number of the pages image, and the entries; ``name`` is for the error."""
    if data[:_MESSAGES] != _MAGICS:
        raise RestoreFailed(f"{name} is no page map of CRIU's", "Use --mode stop-copy with this CRIU.")
    messages: list[dict[int, int]] = []
    at = _MESSAGES
    while at < len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        messages.append(_fields(data[at : at + length], name))
        at += length
    if not messages:
        raise RestoreFailed(f"{name} is empty")
    # A message without flags means present; the number of pages has a field of 64 bits from CRIU 4.2 on.
    return messages[0][_PAGES_IMAGE], [
        Entry(each[_ADDRESS], each.get(_PAGES) or each[_COMPAT_PAGES], each.get(_FLAGS, PRESENT))
        for each in messages[1:]
    ]


def _fields(message: bytes, name: str) -> dict[int, int]:
    fields: dict[int, int] = {}
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        if tag & 7:
            raise RestoreFailed(f"{name} has a field of wire type {tag & 7}", "Use --mode stop-copy with this CRIU.")
        fields[tag >> 3], at = _read_varint(message, at)
    return fields


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
