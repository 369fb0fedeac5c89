"""Images of connections go while others are written; small ones go in groups."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.agent.channel import CHUNK_BYTES
from coordinator.agent.fakes.clock import run
from coordinator.agent.fakes.images import FakeImageSpace
from coordinator.agent.fakes.world import Life, World
from coordinator.agent.messages import ChannelMessage, ImageChunk, SmallImages
from coordinator.agent.outgoing import _SMALL_BYTES, InTurn, SentImages, batches, send_finished, send_images
from tests.unit.agent.memory.pagemaps import serialize
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
        early = await send_finished(sink, images, dumped, lambda *_: None, lambda: None)
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
        await send_finished(Sink(), images, dumped, lambda *_: None, lambda: None)
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


class Dumping:
    """A dump of tasks, one after the other: the next step is made when the sender has seen the last one."""

    def __init__(self, images: FakeImageSpace, sink: Sink) -> None:
        self._images = images
        self._sink = sink
        self.seen: dict[str, set[str]] = {}

    async def begin(self, number: int, pages: bytes) -> None:
        self._images.write(f"pagemap-{number}.img", 0, serialize(number + 100, []))
        self._images.write(f"pages-{number + 100}.img", 0, pages[:1])
        await asyncio.sleep(0.1)
        self._images.write(f"pages-{number + 100}.img", 0, pages)

    async def of_two_tasks(self, mountpoints: bool) -> None:
        await self.begin(1, b"first" * _SMALL_BYTES)
        self.seen["in the first"] = set(self._sink.files)
        await self.begin(2, b"second")
        self.seen["in the second"] = set(self._sink.files)
        self._images.write("mountpoints-9.img" if mountpoints else "pstree.img", 0, b"")
        self._images.write("pagemap-shmem-3.img", 0, serialize(103, []))
        self._images.write("pages-103.img", 0, b"shared")
        await asyncio.sleep(0.1)
        self.seen["behind them"] = set(self._sink.files)


@pytest.mark.parametrize("mountpoints", [True, False])
def test_the_pages_of_a_task_go_when_the_next_is_dumped(images: FakeImageSpace, *, mountpoints: bool) -> None:
    sink = Sink()
    dumping = Dumping(images, sink)
    told: list[set[str]] = []

    async def both() -> SentImages:
        dumped = asyncio.ensure_future(dumping.of_two_tasks(mountpoints))
        early = await send_finished(sink, images, dumped, lambda *_: None, lambda: told.append(set(sink.files)))
        await dumped
        return await send_images(sink, images, {}, lambda *_: None, early)

    sent = run(both())
    assert told == [{"pages-101.img"}]
    assert dumping.seen == {
        "in the first": set(),
        "in the second": {"pages-101.img"},
        "behind them": {"pages-101.img", "pages-102.img"},
    }
    assert {name: len(content) for name, content in sink.files.items()} == sent.sizes == images.sizes()
    assert sink.files["pages-101.img"] == b"first" * _SMALL_BYTES
    assert sink.files["pages-102.img"] == b"second"
    assert sent.bytes == sum(sent.sizes.values())


def test_what_was_begun_is_not_sent_to_its_end_when_the_dump_has_failed(images: FakeImageSpace) -> None:
    sink = Sink()

    async def failing() -> None:
        dumped: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def fail(*_: object) -> None:
            if not dumped.done():
                dumped.set_exception(OSError("no"))

        images.write("pagemap-1.img", 0, serialize(1, []))
        images.write("pages-1.img", 0, b"x" * 3 * CHUNK_BYTES)
        images.write("pstree.img", 0, b"")
        await send_finished(sink, images, dumped, fail, lambda: None)
        assert dumped.exception() is not None

    run(failing())
    assert len(sink.files["pages-1.img"]) == CHUNK_BYTES


@given(st.lists(st.integers(1, 3), max_size=8), st.booleans())
def test_what_is_written_in_turn_is_finished_once_and_never_the_last(steps: list[int], ended: bool) -> None:
    turn, found, finished = InTurn(), set[str](), list[str]()
    for step in steps:
        found = found | {str(len(found) + number) for number in range(step)}
        new = turn.finished(found)
        assert str(len(found) - 1) not in new
        turn.take(new)
        finished += new
    if ended:
        finished += turn.finished(found, ended=True)
        assert set(finished) == found
    assert len(finished) == len(set(finished))
