"""Images of connections go while others are written; small ones go in groups."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.agent.fakes.clock import run
from coordinator.agent.fakes.images import FakeImageSpace
from coordinator.agent.fakes.world import Life, World
from coordinator.agent.messages import ChannelMessage, ImageChunk, SmallImages
from coordinator.agent.outgoing import _SMALL_BYTES, SentImages, batches, send_finished, send_images
from tests.unit.agent.stage import make_plan

MOST = 100


class Sink:
    """Where images go: their contents by name, and how often each came."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.times: dict[str, int] = {}
        self.messages = 0

    async def send(self, message: ChannelMessage, payload: bytes = b"") -> None:
        self.messages += 1
        if isinstance(message, ImageChunk):
            self.files[message.name] = self.files.get(message.name, b"")[: message.offset] + payload
            return
        assert isinstance(message, SmallImages)
        at = 0
        for name, size in zip(message.names, message.sizes, strict=True):
            self.files[name] = payload[at : at + size]
            self.times[name] = self.times.get(name, 0) + 1
            at += size
        await asyncio.sleep(0)

    async def receive(self) -> tuple[ChannelMessage, bytes]:
        raise NotImplementedError

    async def close(self) -> None: ...


@pytest.fixture
def images(tmp_path: Path) -> FakeImageSpace:
    world = World(tmp_path, make_plan())
    world.source.files = {}
    return FakeImageSpace(Life(world, world.source))


def name_of(number: int) -> str:
    return f"tcp-stream-{number:x}.img"


def dump_of(
    images: FakeImageSpace, connections: int, a_second: int, sink: Sink, content: Callable[[int], bytes] = b"%d".__mod__
) -> Callable[[], tuple[SentImages, SentImages]]:
    """A dump with so many connections, so many of them a second, of which the last is never complete before its end."""

    async def dumping() -> None:
        images.write("files.img", 0, b"open until the end")
        for number in range(connections):
            images.write(name_of(number), 0, b"")
            await asyncio.sleep(1 / a_second)
            images.write(name_of(number), 0, content(number))
        images.write("inventory.img", 0, b"last")

    async def both() -> tuple[SentImages, SentImages]:
        dumped = asyncio.ensure_future(dumping())
        early = await send_finished(sink, images, dumped, lambda *_: None)
        await dumped
        return early, await send_images(sink, images, {}, lambda *_: None, early)

    return lambda: run(both())


def test_images_of_connections_are_sent_while_the_dump_goes_on(images: FakeImageSpace) -> None:
    sink = Sink()
    early, sent = dump_of(images, 5000, 10_000, sink)()
    assert 4000 < len(early.sizes) < 5000
    assert sent.sizes == images.sizes() == {name: len(content) for name, content in sink.files.items()}
    assert all(sink.files[name_of(number)] == b"%d" % number for number in range(5000))
    assert set(sink.times.values()) == {1}
    assert sent.bytes == sum(map(len, sink.files.values()))


def test_few_connections_go_at_the_end_in_one_message(images: FakeImageSpace) -> None:
    sink = Sink()
    early, _ = dump_of(images, 150, 1000, sink)()
    assert not early.sizes
    assert sink.messages == 1
    assert sink.files.keys() == images.names()


@pytest.mark.parametrize("size", [_SMALL_BYTES - 1, _SMALL_BYTES, _SMALL_BYTES + 1])
def test_of_a_connection_whose_queues_are_long_the_image_is_sent_whole(images: FakeImageSpace, size: int) -> None:
    """Early, if it is known to be whole; or else at the end."""
    sink = Sink()
    contents = [b"%d" % number if number % 100 else b"x" * size for number in range(1000)]
    early, sent = dump_of(images, 1000, 10_000, sink, contents.__getitem__)()
    assert (name_of(100) in early.sizes) is (size < _SMALL_BYTES)
    assert name_of(101) in early.sizes
    assert [sink.files[name_of(number)] for number in range(1000)] == contents
    assert sent.sizes == images.sizes()
    assert set(sink.times.values()) == {1}
    assert sent.bytes == sum(map(len, sink.files.values()))


def test_what_was_sent_is_not_looked_at_again(images: FakeImageSpace) -> None:
    for number in range(3):
        images.write(name_of(number), 0, b"new")
    sink = Sink()
    sent = run(send_images(sink, images, {}, lambda *_: None, SentImages(5, {name_of(1): 5})))
    assert sink.files.keys() == {name_of(0), name_of(2)}
    assert sent == SentImages(11, {name_of(0): 3, name_of(1): 5, name_of(2): 3})


def test_a_dump_that_fails_ends_the_sending(images: FakeImageSpace) -> None:
    async def failing() -> None:
        await asyncio.sleep(1)
        raise ValueError("no dump")

    async def both() -> None:
        dumped = asyncio.ensure_future(failing())
        await send_finished(Sink(), images, dumped, lambda *_: None)
        await dumped

    with pytest.raises(ValueError, match="no dump"):
        run(both())


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(0, MOST)))
def test_every_name_is_in_one_group_and_no_group_is_too_large(sizes: dict[str, int]) -> None:
    groups = list(batches(sizes, MOST))
    assert [name for group in groups for name in group] == sorted(sizes)
    assert all(group and sum(sizes[name] for name in group) <= MOST for group in groups)


def test_neighbours_that_fit_share_a_group() -> None:
    assert list(batches({"a": 60, "b": 40, "c": 1, "d": 100}, MOST)) == [["a", "b"], ["c"], ["d"]]
