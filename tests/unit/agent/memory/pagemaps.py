"""Page maps as CRIU writes them."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from coordinator.agent.memory.pagemap_images import Entry

MAGICS = struct.pack("=II", 0x54564319, 0x56084025)


def serialize(pages_image: int, entries: Iterable[Entry], *, wide: bool = True) -> bytes:
    """A page map; ``wide`` as from CRIU 4.2 on."""
    messages: list[dict[int, int]] = [{1: pages_image}]
    for entry in entries:
        counts = {2: 0, 5: entry.pages} if wide else {2: entry.pages}
        messages.append({1: entry.start, 4: entry.flags, **counts})
    parts = [MAGICS]
    for fields in messages:
        message = b"".join(varint(number << 3) + varint(value) for number, value in sorted(fields.items()))
        parts += [struct.pack("=I", len(message)), message]
    return b"".join(parts)


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
