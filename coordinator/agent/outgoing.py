"""What the source sends of CRIU's images: many small files, and a few that may be large."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from coordinator.agent.channel import CHUNK_BYTES, Channel
from coordinator.agent.images import ImageSpace
from coordinator.agent.memory.shared import Span
from coordinator.agent.messages import ImageChunk, SmallImages, StoredParts
from coordinator.events import Progress

#: A dump leaves some sixty files, most of them of a few hundred bytes: a message for each costs more than its content.
_SMALL_BYTES = 64 * 1024

#: What the destination has of an image from the rounds: the object's number, and the spans.
Stored = tuple[int, list[Span]]


async def send_images(link: Channel, images: ImageSpace, stored: Mapping[str, Stored], progress: Progress) -> int:
    """Send all images that are there; of those in ``stored``, only what the destination does not have.

    Returns the bytes sent; ``progress`` is told of them."""
    sizes = images.sizes()
    small = {name: size for name, size in sizes.items() if size <= _SMALL_BYTES and name not in stored}
    sent, total = 0, sum(sizes.values())

    async def send(name: str, start: int, length: int) -> None:
        nonlocal sent
        for offset in range(start, start + max(length, 1), CHUNK_BYTES):
            chunk = images.read(name, offset, min(CHUNK_BYTES, start + length - offset))
            await link.send(ImageChunk(name=name, offset=offset), chunk)
            sent += len(chunk)
            progress("images", sent, total)

    for names in batches(small, CHUNK_BYTES):
        content = b"".join(images.read(name, 0, small[name]) for name in names)
        await link.send(SmallImages(names=tuple(names), sizes=tuple(small[name] for name in names)), content)
        sent += len(content)
        progress("images", sent, total)
    for name in sorted(sizes.keys() - small.keys()):
        if name not in stored:
            await send(name, 0, sizes[name])
            continue
        number, spans = stored[name]
        for span in spans:
            if not span.sent:
                await send(name, span.offset, span.bytes)
        if have := [span for span in spans if span.sent]:
            offsets, starts, counts = zip(*((span.offset, span.address, span.pages) for span in have), strict=True)
            await link.send(StoredParts(name=name, pid=number, offsets=offsets, starts=starts, counts=counts))
    return sent


def batches(sizes: Mapping[str, int], most: int) -> Iterator[Sequence[str]]:
    """Names in their order, in groups of at most ``most`` bytes (pure). None is larger than that by itself."""
    group: list[str] = []
    total = 0
    for name in sorted(sizes):
        if group and total + sizes[name] > most:
            yield group
            group, total = [], 0
        group.append(name)
        total += sizes[name]
    if group:
        yield group
