"""Requests for pages under way: answered in any order, and failed at once when nobody will answer any more."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.agent.fakes.channel import fake_channel
from coordinator.agent.memory.fetching import PageFetcher
from coordinator.agent.messages import FetchedPages, FetchPages, Go
from coordinator.errors import AgentFailed, ChannelFailed, ProtocolError


async def test_answers_come_in_any_order() -> None:
    source, here = fake_channel()
    fetcher = PageFetcher(here)
    first, second = (asyncio.ensure_future(fetcher.fetch(1, address, 1)) for address in (0, 4096))
    asked = [(await source.receive())[0] for _ in range(2)]
    assert asked == [FetchPages(number=n, pid=1, address=n * 4096, count=1) for n in range(2)]
    fetcher.begin()
    await source.send(FetchedPages(number=1), b"two")
    await source.send(FetchedPages(number=7), b"nobody asked")
    assert await second == b"two"
    await source.send(FetchedPages(number=0), b"one")
    assert await first == b"one"
    await fetcher.close(ChannelFailed("over"))


async def test_before_it_begins_the_half_hands_answers_over() -> None:
    source, here = fake_channel()
    fetcher = PageFetcher(here)
    asked = asyncio.ensure_future(fetcher.fetch(1, 0, 1))
    await source.receive()
    fetcher.answer(FetchedPages(number=0), b"x")
    fetcher.answer(FetchedPages(number=0), b"again")
    assert await asked == b"x"
    await fetcher.close(ChannelFailed("never begun"))


@pytest.mark.parametrize(
    ("trouble", "error"), [("cut", ChannelFailed), ("nonsense", ProtocolError), ("a defect", AgentFailed)]
)
async def test_when_the_source_is_lost_whoever_waits_or_asks_later_is_told(
    trouble: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, here = fake_channel()
    fetcher = PageFetcher(here)
    asked = asyncio.ensure_future(fetcher.fetch(1, 0, 1))
    await source.receive()
    if trouble == "a defect":
        monkeypatch.setattr(fetcher, "answer", lambda message, payload: message.unknown)
    fetcher.begin()
    if trouble == "cut":
        source.cut()
    else:
        await source.send(Go() if trouble == "nonsense" else FetchedPages(number=0), b"")
    with pytest.raises(error):
        await asked
    with pytest.raises(error):
        await fetcher.fetch(1, 0, 1)
    await fetcher.close(ChannelFailed("over"))


async def test_closing_fails_what_is_under_way_and_what_comes_later() -> None:
    source, here = fake_channel()
    fetcher = PageFetcher(here)
    fetcher.begin()
    asked = asyncio.ensure_future(fetcher.fetch(1, 0, 1))
    await source.receive()
    await fetcher.close(ChannelFailed("over"))
    await fetcher.close(ChannelFailed("over, again"))
    for fetch in (asked, fetcher.fetch(1, 0, 1)):
        with pytest.raises(ChannelFailed, match=r"^over$"):
            await fetch
