"""Asks the frozen source for pages that were not sent, over the halves' channel (post-copy).

Also before the commit: a restore touches a page here and there. Until ``begin`` the half itself receives from the
channel and hands answers over; after it the fetcher does.
"""

from __future__ import annotations

import asyncio
import itertools

from coordinator.agent.channel import Channel
from coordinator.agent.messages import FetchedPages, FetchPages
from coordinator.errors import AgentFailed, LivemoveError, ProtocolError


class PageFetcher:
    """Requests under way, answered in any order."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._reason: LivemoveError | None = None

    async def fetch(self, pid: int, address: int, count: int) -> bytes:
        """The content of ``count`` pages; raises ``ChannelFailed`` if the source is gone."""
        if self._reason is not None:
            raise self._reason
        number = next(self._numbers)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            await self._channel.send(FetchPages(number=number, pid=pid, address=address, count=count))
            return await answer
        finally:
            del self._waiting[number]
            if not answer.cancel() and not answer.cancelled():
                answer.exception()  # seen, also if sending has failed meanwhile

    def answer(self, message: FetchedPages, payload: bytes) -> None:
        """Take the source's answer."""
        waiting = self._waiting.get(message.number)
        if waiting is not None and not waiting.done():
            waiting.set_result(payload)

    def begin(self) -> None:
        """Receive the answers from now on; nobody else receives from the channel any more."""
        self._reader = asyncio.create_task(self._read())
        self._reader.add_done_callback(self._reading_ended)

    async def close(self, reason: LivemoveError) -> None:
        """Stop receiving; whoever still waits gets ``reason``. Idempotent."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait((self._reader,))
        self._fail(reason)

    async def _read(self) -> None:
        while True:
            message, payload = await self._channel.receive()
            if not isinstance(message, FetchedPages):
                raise ProtocolError(f"the source sent {type(message).__name__} while pages were fetched")
            self.answer(message, payload)

    def _reading_ended(self, reader: asyncio.Task[None]) -> None:
        """Whatever it was that ended it, nobody waits for an answer that cannot come."""
        error = None if reader.cancelled() else reader.exception()
        if isinstance(error, LivemoveError):
            self._fail(error)
        elif error is not None:
            self._fail(AgentFailed(f"pages cannot be fetched: {error!r}"))

    def _fail(self, reason: LivemoveError) -> None:
        self._reason = self._reason or reason
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(reason)
