"""What the source sends of CRIU's images: many small files, and a few that may be large."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from coordinator.agent.channel import CHUNK_BYTES, Channel
from coordinator.agent.images import ImageSpace
from coordinator.agent.memory.shared import Span
from coordinator.agent.messages import ImageChunk, SmallImages, StoredParts
from coordinator.events import Progress

#: A dump leaves some sixty files, most of them of a few hundred bytes: a message for each costs more than its content.
_SMALL_BYTES = 64 * 1024

#: There is one for each connection. CRIU opens, writes and closes them one after the other (criu/sk-tcp.c,
#: dump_tcp_conn_state), so that all but the last are complete. If one were not, the restore would fail.
_OF_CONNECTION = "tcp-stream-"
#: How often to look for them, how many are worth a message, and how many are read before anything else gets its turn.
_LOOK_S, _WORTH, _AT_ONCE = 0.02, 200, 400

#: What the destination has of an image from the rounds: the object's number, and the spans.
Stored = tuple[int, list[Span]]


@dataclass(frozen=True, slots=True)
class SentImages:
    """What was sent: the bytes, and the size of each image that the destination has now."""

    bytes: int
    sizes: Mapping[str, int]


NOTHING_SENT = SentImages(0, {})


async def send_finished(
    link: Channel, images: ImageSpace, dumped: asyncio.Future[None], progress: Progress
) -> SentImages:
    """While CRIU dumps, send what it has finished with: the small images of connections, if there are many.

    Returns as soon as ``dumped`` is done, whatever its outcome."""
    sizes: dict[str, int] = {}
    known: set[str] = set()
    read: set[str] = set()
    sent = 0
    while not (await asyncio.wait((dumped,), timeout=_LOOK_S))[0]:
        found = {name for name in images.names() if name.startswith(_OF_CONNECTION)}
        finished, known = known - read if found > known else set(), found
        if len(finished) < _WORTH:
            continue
        names = sorted(finished)[:_AT_ONCE]
        read.update(names)
        contents = {name: images.read(name, 0, _SMALL_BYTES) for name in names}
        small = {name: content for name, content in contents.items() if len(content) < _SMALL_BYTES}  # nothing is left
        lengths = {name: len(content) for name, content in small.items()}
        await link.send(SmallImages(names=tuple(lengths), sizes=tuple(lengths.values())), b"".join(small.values()))
        sizes |= lengths
        sent += sum(lengths.values())
        progress("images", sent, sent)
    return SentImages(sent, sizes)


async def send_images(
    link: Channel,
    images: ImageSpace,
    stored: Mapping[str, Stored],
    progress: Progress,
    before: SentImages = NOTHING_SENT,
) -> SentImages:
    """Send all images that are there, but what was sent ``before``; of those in ``stored``, only what the destination
    does not have. ``progress`` is told of the bytes."""
    missing = images.sizes(before.sizes)
    sizes = {**before.sizes, **missing}
    small = {name: size for name, size in missing.items() if size <= _SMALL_BYTES and name not in stored}
    sent, total = before.bytes, sum(sizes.values())

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
    for name in sorted(missing.keys() - small.keys()):
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
    return SentImages(sent, sizes)


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
