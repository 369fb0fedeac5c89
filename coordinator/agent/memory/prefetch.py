"""Puts the pages a service is about to touch into its images, so that it does not wait for them one by one.

A task restored without its memory waits some 100 µs at each page it touches first. Which these are is known in part:
those it wrote last, and those in small pieces of memory (stacks, arenas, tables), which a service uses all over, while
a large piece holds its data. Both are moved, as far as the store has them, from "lazy" to "present" in CRIU's page map,
and their contents into the pages image, before the restore reads them. The daemon leaves alone what is not lazy.

The format (CRIU, images/pagemap.proto, criu/include/magic.h): two magic numbers, then messages behind a 32-bit length:
a head with the number of the pages image, and entries sorted by address. The contents of the present entries are in the
pages image in the same order. All fields are varints, so this needs no protobuf library on a host.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from coordinator.agent.memory.base import PAGE_BYTES
from coordinator.errors import RestoreFailed

_MAGICS = struct.pack("=II", 0x54564319, 0x56084025)
_LENGTH = struct.Struct("=I")
_ADDRESS, _COMPAT_PAGES, _FLAGS, _PAGES = 1, 2, 4, 5
_LAZY, _PRESENT = 1 << 1, 1 << 2

#: (pid, address, pages) → content.
ReadStore = Callable[[int, int, int], bytes]

#: (pid, page numbers) → those of them that the store has.
Held = Callable[[int, range], Iterable[range]]


@dataclass(frozen=True, slots=True)
class Entry:
    """A run of pages in a page map: its message's fields by number."""

    fields: dict[int, int]

    @property
    def start(self) -> int:
        """Address of the first page."""
        return self.fields[_ADDRESS]

    @property
    def pages(self) -> int:
        """Number of pages; from CRIU 4.2 on in a field of 64 bits."""
        return self.fields.get(_PAGES, self.fields[_COMPAT_PAGES])

    @property
    def flags(self) -> int:
        """PE_LAZY, PE_PRESENT, …; a message without the field means present (criu/pagemap.c)."""
        return self.fields.get(_FLAGS, _PRESENT)

    def part(self, start: int, pages: int, flags: int) -> Entry:
        """A part of this run with other flags, in the same version of the format."""
        fields = {**self.fields, _ADDRESS: start, _FLAGS: flags}
        for number in (_COMPAT_PAGES, _PAGES):
            if self.fields.get(number):  # where this version leaves one of the two at 0, so do we
                fields[number] = pages
        return Entry(fields)


def processes(images: Path) -> list[int]:
    """The processes that have a page map."""
    names = (path.stem.removeprefix("pagemap-") for path in images.glob("pagemap-*.img"))
    return sorted(int(name) for name in names if name.isdigit())


def prefetch(images: Path, pid: int, hot: Iterable[range], read: ReadStore, *, held: Held, pages: int) -> int:
    """Move the hot pages of a process into its images, and the smallest pieces of its memory as far as ``pages`` allows
    beside them. ``hot`` are page numbers, all held. Returns how many pages it moved.

    Raises ``RestoreFailed`` for a page map it does not know."""
    path = images / f"pagemap-{pid}.img"
    head, entries = parse(path.read_bytes(), path)
    hot = [numbers for numbers in hot if numbers]
    small = small_pieces(entries, pages - sum(map(len, hot)))
    wanted = sorted((*hot, *(part for piece in small for part in held(pid, piece))), key=lambda part: part.start)
    split = list(split_entries(entries, wanted))
    moved = sum(entry.pages for entry, fresh in split if fresh)
    if not moved:
        return 0
    _write_pages(images / f"pages-{head.fields[1]}.img", split, lambda entry: read(pid, entry.start, entry.pages))
    path.write_bytes(serialize(head, [entry for entry, _ in split]))
    return moved


def small_pieces(entries: list[Entry], pages: int) -> list[range]:
    """The shortest lazy runs that together have no more than so many pages, as page numbers (pure)."""
    found: list[range] = []
    lazy = (entry for entry in entries if entry.flags & _LAZY and not entry.flags & _PRESENT)
    for entry in sorted(lazy, key=lambda entry: entry.pages):
        pages -= entry.pages
        if pages < 0:
            break
        first = entry.start // PAGE_BYTES
        found.append(range(first, first + entry.pages))
    return found


def split_entries(entries: list[Entry], hot: list[range]) -> Iterator[tuple[Entry, bool]]:
    """Cut the lazy entries so that the hot pages among them become present ones, marked ``True`` (pure).

    ``hot``: sorted page numbers; those that are in no lazy entry are passed over, overlaps are taken once."""
    at = 0
    for entry in entries:
        first, end = entry.start // PAGE_BYTES, entry.start // PAGE_BYTES + entry.pages
        if not entry.flags & _LAZY or entry.flags & _PRESENT:
            yield entry, False
            continue
        here = first
        while at < len(hot) and hot[at].stop <= here:
            at += 1
        look = at
        while look < len(hot) and hot[look].start < end:
            start, stop = max(hot[look].start, here), min(hot[look].stop, end)
            if start < stop:
                if here < start:
                    yield entry.part(here * PAGE_BYTES, start - here, entry.flags), False
                yield entry.part(start * PAGE_BYTES, stop - start, _PRESENT), True
                here = stop
            look += 1
        if here < end:
            yield entry.part(here * PAGE_BYTES, end - here, entry.flags), False


def _write_pages(path: Path, split: list[tuple[Entry, bool]], content: Callable[[Entry], bytes]) -> None:
    """Write the pages image anew: what was in it, and the hot pages, in the order of the entries."""
    fresh_path = path.with_suffix(".new")
    old = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with fresh_path.open("wb", buffering=1 << 20) as new:
            offset = 0
            for entry, fresh in split:
                if fresh:
                    new.write(content(entry))
                elif entry.flags & _PRESENT:
                    length = entry.pages * PAGE_BYTES
                    new.write(os.pread(old, length, offset))
                    offset += length
    finally:
        os.close(old)
    fresh_path.rename(path)


def parse(data: bytes, path: Path) -> tuple[Entry, list[Entry]]:
    """The head and the entries of a page map; ``path`` is for the error."""
    if data[: len(_MAGICS)] != _MAGICS:
        raise RestoreFailed(f"{path.name} is no page map of CRIU's", "Use --mode stop-copy with this CRIU.")
    messages = []
    at = len(_MAGICS)
    while at < len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        messages.append(Entry(_fields(data[at : at + length], path)))
        at += length
    if not messages:
        raise RestoreFailed(f"{path.name} is empty")
    return messages[0], messages[1:]


def serialize(head: Entry, entries: Iterable[Entry]) -> bytes:
    """The page map as CRIU reads it."""
    parts = [_MAGICS]
    for entry in (head, *entries):
        message = b"".join(_varint(number << 3) + _varint(value) for number, value in sorted(entry.fields.items()))
        parts += [_LENGTH.pack(len(message)), message]
    return b"".join(parts)


def _fields(message: bytes, path: Path) -> dict[int, int]:
    fields: dict[int, int] = {}
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        if tag & 7:
            raise RestoreFailed(
                f"{path.name} has a field of wire type {tag & 7}", "Use --mode stop-copy with this CRIU."
            )
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


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
