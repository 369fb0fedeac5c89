"""What the destination takes in before the restore: pages in rounds, then the images with the last pages."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from coordinator.agent.channel import Channel, peer_aborted
from coordinator.agent.files.base import FilesTarget
from coordinator.agent.images import ImageSpace
from coordinator.agent.memory.filling import FillingMemory
from coordinator.agent.memory.store import PAGE_BYTES
from coordinator.agent.messages import (
    ChannelMessage,
    ConnectionsTracked,
    GiveUp,
    ImageChunk,
    ImagesComplete,
    RoundEnd,
    RoundStored,
    SmallImages,
    StoredParts,
    SyncBegin,
    TrackedConnections,
)
from coordinator.errors import ProtocolError

_PAGES_AT_ONCE = 1024

#: Makes entries of tracked connections.
Track = Callable[[bytes], Awaitable[None]]


async def receive_rounds(
    link: Channel,
    images: ImageSpace,
    memory: FillingMemory | None,
    track: Track,
    files: FilesTarget,
    *,
    until: type[ChannelMessage],
) -> None:
    """Store what the copying source sends, and what a runtime has written before its dump, until a message comes."""
    while True:
        message, payload = await link.receive()
        if isinstance(message, until):
            return
        if isinstance(message, ImageChunk | SmallImages):
            _write(message, payload, images)
        elif isinstance(message, TrackedConnections):
            await _track(link, track, message, payload)
        elif isinstance(message, SyncBegin):
            await files.receive(link, message)
        elif isinstance(message, RoundEnd):
            if memory is not None:
                memory.take(message, payload)
            await link.send(RoundStored(n=message.n))
        elif isinstance(message, GiveUp):
            raise peer_aborted(message)
        elif memory is None or not memory.take(message, payload):
            raise ProtocolError(f"the source sent {type(message).__name__} where {until.__name__} was due")


async def receive_images(
    link: Channel, images: ImageSpace, memory: FillingMemory | None, track: Track, files: FilesTarget
) -> tuple[bool, int]:
    """Receive the images and the last pages: whether more pages are to be fetched later, and the images' bytes."""
    received = 0
    while True:
        message, payload = await link.receive()
        if memory is not None and memory.take(message, payload):
            continue
        if isinstance(message, ImageChunk | SmallImages):
            _write(message, payload, images)
            received += len(payload)
        elif isinstance(message, TrackedConnections):
            await _track(link, track, message, payload)
        elif isinstance(message, SyncBegin):
            await files.receive(link, message)
        elif isinstance(message, StoredParts) and memory is not None:
            await asyncio.to_thread(_write_stored, message, images, memory)
        elif isinstance(message, ImagesComplete):
            if images.written != message.sizes:
                here = sum(images.written.values())
                raise ProtocolError(f"images of {here} bytes, {sum(message.sizes.values())} were sent")
            return message.pages_later, received
        elif isinstance(message, GiveUp):
            raise peer_aborted(message)
        else:
            raise ProtocolError(f"the source sent {type(message).__name__} among the images")


async def _track(link: Channel, track: Track, message: TrackedConnections, entries: bytes) -> None:
    await track(entries)
    if message.acknowledge:
        await link.send(ConnectionsTracked())


def _write(message: ImageChunk | SmallImages, payload: bytes, images: ImageSpace) -> None:
    if isinstance(message, ImageChunk):
        images.write(message.name, message.offset, payload)
        return
    if sum(message.sizes) != len(payload):
        raise ProtocolError(f"images of {sum(message.sizes)} bytes are said to come, {len(payload)} came")
    offset = 0
    for name, size in zip(message.names, message.sizes, strict=True):
        images.write(name, 0, payload[offset : offset + size])
        offset += size


def _write_stored(message: StoredParts, images: ImageSpace, memory: FillingMemory) -> None:
    """Put pages that came in the rounds where they belong in an image."""
    for offset, start, count in zip(message.offsets, message.starts, message.counts, strict=True):
        for first in range(0, count, _PAGES_AT_ONCE):
            done = first * PAGE_BYTES
            content = memory.content(message.pid, start + done, min(_PAGES_AT_ONCE, count - first))
            images.write(message.name, offset + done, content)
