"""What the source sends of CRIU's images: many small files, and a few that may be large.

Most are sent when the dump is complete. What CRIU is known to have finished with by then goes while it dumps the rest.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from coordinator.agent.channel import CHUNK_BYTES, Channel
from coordinator.agent.images import ImageSpace
from coordinator.agent.memory.pagemap_images import HEAD_BYTES, pages_image, process_of
from coordinator.agent.memory.shared import Span
from coordinator.agent.messages import ImageChunk, SmallImages, StoredParts
from coordinator.events import Progress

#: A dump leaves some sixty files, most of them of a few hundred bytes: a message for each costs more than its content.
_SMALL_BYTES = 64 * 1024

#: There is one for each connection. CRIU opens, writes and closes them one after the other (criu/sk-tcp.c,
#: dump_tcp_conn_state), so that all but the last are complete. If one were not, the restore would fail.
_OF_CONNECTION = "tcp-stream-"
#: How many are worth a message, and how many are read before anything else gets its turn.
_WORTH, _AT_ONCE = 200, 400
#: How often to look for what there is, but not more often than that part of the time is needed for.
_LOOK_S, _LOOK_SHARE = 0.005, 4

#: The same is true of tasks, each with the map of its pages and the pages (criu/cr-dump.c, cr_dump_tasks). These come
#: when the last task is complete, that of a container or of a plain process tree.
_AFTER_TASKS = ("mountpoints-", "pstree.")

#: What the destination has of an image from the rounds: the object's number, and the spans.
Stored = tuple[int, list[Span]]


@dataclass(frozen=True, slots=True)
class SentImages:
    """What was sent: the bytes, and the size of each image that the destination has now."""

    bytes: int
    sizes: Mapping[str, int]


NOTHING_SENT = SentImages(0, {})


class InTurn:
    """Images that are written one after the other (pure)."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._taken: set[str] = set()

    def finished(self, found: set[str], *, ended: bool = False) -> set[str]:
        """Those that are complete, of these that there are now, and not ``taken``: all, when that has ``ended``; those
        that were there in the look before, if there is a later one; or none that is known to be."""
        complete = found if ended else self._known if found > self._known else set()
        self._known = found
        return complete - self._taken

    def take(self, names: Iterable[str]) -> None:
        """These are not finished again."""
        self._taken.update(names)


class _Sending:
    """Sends images, as long as they are ``wanted``, and counts what was sent. ``progress`` is told of the bytes, of so
    many in ``total`` if that is known."""

    def __init__(
        self,
        link: Channel,
        images: ImageSpace,
        progress: Progress,
        before: SentImages = NOTHING_SENT,
        *,
        total: int = 0,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        self._link = link
        self._images = images
        self._progress = progress
        self._bytes = before.bytes
        self._total = total
        self._wanted = wanted
        self.sizes = dict(before.sizes)

    async def together(self, contents: Mapping[str, bytes]) -> None:
        """Small images, in one message."""
        lengths = {name: len(content) for name, content in contents.items()}
        self.sizes |= lengths
        message = SmallImages(names=tuple(lengths), sizes=tuple(lengths.values()))
        await self._send(message, b"".join(contents.values()))

    async def whole(self, name: str, size: int) -> None:
        """An image of any size."""
        self.sizes[name] = size
        await self.piece(name, 0, size)

    async def piece(self, name: str, start: int, length: int) -> None:
        """So many bytes of an image."""
        for offset in range(start, start + max(length, 1), CHUNK_BYTES):
            if not self._wanted():
                return
            chunk = self._images.read(name, offset, min(CHUNK_BYTES, start + length - offset))
            await self._send(ImageChunk(name=name, offset=offset), chunk)

    def sent(self) -> SentImages:
        """All of it."""
        return SentImages(self._bytes, self.sizes)

    async def _send(self, message: SmallImages | ImageChunk, content: bytes) -> None:
        await self._link.send(message, content)
        self._bytes += len(content)
        self._progress("images", self._bytes, max(self._bytes, self._total))


async def send_finished(
    link: Channel,
    images: ImageSpace,
    dumped: asyncio.Future[None],
    progress: Progress,
    tasks_dumped: Callable[[], None],
) -> SentImages:
    """While CRIU dumps, send what it has finished with: the pages of tasks, and the small images of connections, if
    there are many. Calls ``tasks_dumped`` when it has finished with all tasks, if it is seen before the dump is over.

    Returns when ``dumped`` is done, whatever its outcome, and what was begun is sent, unless it has failed."""
    sending = _Sending(link, images, progress, wanted=lambda: not _has_failed(dumped))
    tasks, connections = InTurn(), InTurn()
    tasks_ended, looked_s = False, 0.0
    while not (await asyncio.wait((dumped,), timeout=max(_LOOK_S, _LOOK_SHARE * looked_s)))[0]:
        began = time.monotonic()
        names = images.names()
        looked_s = time.monotonic() - began
        if not tasks_ended and any(each.startswith(_AFTER_TASKS) for each in names):
            tasks_ended = True
            tasks_dumped()
        finished = connections.finished({name for name in names if name.startswith(_OF_CONNECTION)})
        if len(finished) >= _WORTH:
            read = sorted(finished)[:_AT_ONCE]
            connections.take(read)
            contents = {name: images.read(name, 0, _SMALL_BYTES) for name in read}
            await sending.together({name: each for name, each in contents.items() if len(each) < _SMALL_BYTES})
        maps = {name for name in names if process_of(name) is not None}
        for name in sorted(tasks.finished(maps, ended=tasks_ended)):
            if dumped.done():
                break
            tasks.take((name,))
            pages = pages_image(images.read(name, 0, HEAD_BYTES))
            if pages is not None and pages in names:
                await sending.whole(pages, images.size(pages))
    return sending.sent()


async def send_images(
    link: Channel,
    images: ImageSpace,
    stored: Mapping[str, Stored],
    progress: Progress,
    before: SentImages = NOTHING_SENT,
) -> SentImages:
    """Send all images that are there, but what was sent ``before``; of those in ``stored``, only what the destination
    does not have."""
    missing = images.sizes(before.sizes)
    small = {name: size for name, size in missing.items() if size <= _SMALL_BYTES and name not in stored}
    total = sum(before.sizes.values()) + sum(missing.values())
    sending = _Sending(link, images, progress, before, total=total)
    for names in batches(small, CHUNK_BYTES):
        await sending.together({name: images.read(name, 0, small[name]) for name in names})
    for name in sorted(missing.keys() - small.keys()):
        if name not in stored:
            await sending.whole(name, missing[name])
            continue
        number, spans = stored[name]
        sending.sizes[name] = missing[name]
        for span in spans:
            if not span.sent:
                await sending.piece(name, span.offset, span.bytes)
        if have := [span for span in spans if span.sent]:
            offsets, starts, counts = zip(*((span.offset, span.address, span.pages) for span in have), strict=True)
            await link.send(StoredParts(name=name, pid=number, offsets=offsets, starts=starts, counts=counts))
    return sending.sent()


def _has_failed(future: asyncio.Future[None]) -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)


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
