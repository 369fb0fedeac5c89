"""Which pages CRIU's images leave to whoever fills memory in: the lazy ones.

A page map (CRIU, images/pagemap.proto) has a head with the number of the pages image, and entries sorted by address.
All their fields are numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coordinator.agent.criu_images import messages
from coordinator.agent.protobuf import NUMBER, read_varint
from coordinator.errors import RestoreFailed

#: criu/include/magic.h.
_MAGIC = 0x56084025
_PAGES_IMAGE = 1
_ADDRESS, _COMPAT_PAGES, _FLAGS, _PAGES = 1, 2, 4, 5
LAZY, PRESENT = 1 << 1, 1 << 2

_HINT = "Use --mode stop-copy with this CRIU."


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
        return f"pages-{_fields(next(messages(head, _MAGIC)), '')[_PAGES_IMAGE]}.img"
    except (RestoreFailed, StopIteration, ValueError, LookupError):
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
    try:
        found = [_fields(message, name) for message in messages(data, _MAGIC)]
    except ValueError as error:
        raise RestoreFailed(f"{name} is no page map of CRIU's: {error}", _HINT) from error
    if not found:
        raise RestoreFailed(f"{name} is empty")
    # A message without flags means present; the number of pages has a field of 64 bits from CRIU 4.2 on.
    return found[0][_PAGES_IMAGE], [
        Entry(each[_ADDRESS], each.get(_PAGES) or each[_COMPAT_PAGES], each.get(_FLAGS, PRESENT)) for each in found[1:]
    ]


def _fields(message: bytes, name: str) -> dict[int, int]:
    fields: dict[int, int] = {}
    at = 0
    while at < len(message):
        tag, at = read_varint(message, at)
        if tag & 7 != NUMBER:
            raise RestoreFailed(f"{name} has a field of wire type {tag & 7}", _HINT)
        fields[tag >> 3], at = read_varint(message, at)
    return fields
