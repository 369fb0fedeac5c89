"""A shared object of a real process arrives whole, whatever the rounds have sent of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator

import pytest

from coordinator.agent.channel import Channel
from coordinator.agent.memory.base import PAGE_BYTES
from coordinator.agent.memory.comparing import forget_differing, send_differing
from coordinator.agent.memory.filling import StoredMemory
from coordinator.agent.memory.handing_over import described, hand_over
from coordinator.agent.memory.memfds import Memfds
from coordinator.agent.memory.pages import read_pages
from coordinator.agent.memory.shared import SharedMemory, worth_hiding
from coordinator.agent.memory.tree import TreeTracker
from coordinator.agent.memory.write_protect import WriteProtectTracker
from coordinator.agent.messages import ChannelMessage, HandedOver, PageBatch
from coordinator.errors import TrackingFailed
from tests.contract.memory_target import CHOICE, Target, memory_of

pytestmark = pytest.mark.skipif(CHOICE.name != "write_protect", reason=CHOICE.reason)

PAGES = 512
MAKE = {
    "anonymous": "area({0}, SHARED | ANON)",
    "memfd": "(fd := os.memfd_create('m'), os.ftruncate(fd, {0} * PAGE), area({0}, SHARED, fd), os.close(fd))[2]",
    "compared": "(fd := os.memfd_create('m'), os.ftruncate(fd, {0} * PAGE), area({0}, SHARED, fd))[2]",
}


class Link:
    """The channel, with the destination's memory at its end."""

    def __init__(self) -> None:
        self.memory = StoredMemory()
        self.messages: list[ChannelMessage] = []

    async def send(self, message: ChannelMessage, payload: bytes = b"") -> None:
        assert self.memory.take(message, payload)
        self.messages.append(message)

    def pages(self) -> int:
        return sum(sum(each.counts) for each in self.messages if isinstance(each, PageBatch))


class Moving:
    """The source's rounds over a target, as far as they are about shared memory."""

    def __init__(self, target: Target) -> None:
        self.target, self.link, self.shared = target, Link(), SharedMemory()
        self.tree = TreeTracker(target.pid, WriteProtectTracker, memfds=Memfds())

    @property
    def channel(self) -> Channel:
        return self.link  # type: ignore[return-value]

    async def round(self, *, last: bool = False) -> list[int]:
        """The inodes that CRIU need not see after it."""
        answers = self.tree.collect(last=last).values()
        for wanted in self.shared.round(answers):
            await self.channel.send(described(wanted.object, wanted.pid, wanted.mapping))
            for batch in read_pages(wanted.pid, wanted.runs):
                if wanted.digests is not None:
                    wanted.note(batch)
                starts = tuple(run.start + wanted.shift for run in batch.runs)
                counts = tuple(run.pages for run in batch.runs)
                await self.channel.send(PageBatch(pid=wanted.object, starts=starts, counts=counts), bytes(batch.data))
        if last:
            forget_differing(self.shared)
            await hand_over(self.channel, self.shared, worth_hiding(answers), answers)
        return list(worth_hiding(answers))

    def arrived(self) -> bytes:
        (whole,) = (each for each in self.link.messages if isinstance(each, HandedOver))
        return self.link.memory.content(whole.number, 0, PAGES)


@pytest.fixture(params=MAKE)
def moving(request: pytest.FixtureRequest) -> Iterator[Moving]:
    with Target() as target:
        target.run(f"(start := {MAKE[request.param].format(PAGES)})")
        made = Moving(target)
        yield made
        made.tree.close()
        asyncio.run(made.link.memory.close())


def content(target: Target) -> bytes:
    return memory_of(target.pid, target.run("start"), PAGES * PAGE_BYTES)


async def test_what_the_rounds_have_sent_is_not_sent_again(moving: Moving) -> None:
    target = moving.target
    target.run(f"put(start, 1, {PAGES - 12})")
    assert len(await moving.round()) == 1
    target.run("put(start + 3 * PAGE, 2, 4)")
    await moving.round()
    before = moving.link.pages()
    target.run("put(start + 5 * PAGE, 3, 4)")
    await moving.round(last=True)
    assert moving.link.pages() == before + 4
    assert moving.arrived() == content(target)


async def test_what_no_page_table_shows_and_what_is_gone(moving: Moving) -> None:
    """A child writes and ends; a hole is punched; a part is unmapped, and comes back."""
    target = moving.target
    target.run(f"put(start, 1, {PAGES})")
    await moving.round()
    child = target.fork("put(start + 100 * PAGE, 4, 10); os._exit(0)")
    target.run(f"os.waitpid({child}, 0)")
    target.run("libc.madvise(start + 200 * PAGE, 20 * PAGE, 9)")
    target.run("libc.madvise(start + 300 * PAGE, 20 * PAGE, 4)")
    await moving.round(last=True)
    assert moving.arrived() == content(target)
    assert moving.arrived()[200 * PAGE_BYTES : 220 * PAGE_BYTES] == bytes(20 * PAGE_BYTES)


async def test_what_is_mapped_in_part_arrives_whole(moving: Moving) -> None:
    target = moving.target
    target.run(f"put(start, 1, {PAGES})")
    await moving.round()
    before = content(target)
    target.run(f"libc.munmap(start + {PAGES - 100} * PAGE, 100 * PAGE)")
    await moving.round(last=True)
    assert moving.arrived() == before


async def test_only_large_objects_are_worth_it(moving: Moving) -> None:
    moving.target.run(f"(small := {MAKE['anonymous'].format(8)})")
    moving.target.run("put(small, 1, 8)")
    assert len(await moving.round()) == 1


async def test_what_nobody_maps_cannot_be_handed_over(moving: Moving) -> None:
    with pytest.raises(TrackingFailed, match="no process maps it"):
        await hand_over(moving.channel, moving.shared, [1], [])


@pytest.fixture
def compared() -> Iterator[Moving]:
    """A memfd whose descriptor is kept, full, and sent."""
    with Target() as target:
        target.run(f"globals().update(fd=os.memfd_create('m')); os.ftruncate(fd, {PAGES} * PAGE)")
        target.run(f"(start := area({PAGES}, SHARED, fd)); put(start, 1, {PAGES})")
        made = Moving(target)
        yield made
        made.tree.close()
        asyncio.run(made.link.memory.close())


#: What is written past the page tables that are asked, in pages from 40 on; and how many pages of it differ.
UNSEEN = {
    "a write": ("os.pwrite(fd, b'x' * 5 * PAGE, 40 * PAGE)", 5),
    "a mapping that came and went": (
        "again = area(64, SHARED, fd); put(again + 40 * PAGE, 9, 3); libc.munmap(again, 64 * PAGE)",
        3,
    ),
    "a child that came and went": (
        "child = os.fork()\nif not child: os.pwrite(fd, b'y', 40 * PAGE); os._exit(0)\nos.waitpid(child, 0)",
        1,
    ),
    "the same again": ("os.pwrite(fd, os.pread(fd, 5 * PAGE, 40 * PAGE), 40 * PAGE)", 0),
    "a hole": ("libc.madvise(start + 40 * PAGE, 7 * PAGE, 9)", 0),
    "a shorter file": ("os.ftruncate(fd, 40 * PAGE); os.ftruncate(fd, 300 * PAGE); os.ftruncate(fd, 512 * PAGE)", 0),
}


@pytest.mark.parametrize("what", UNSEEN)
@pytest.mark.parametrize("also_before", [False, True])
async def test_what_is_written_unseen_is_found_and_nothing_else_is_sent_again(
    compared: Moving, what: str, also_before: bool
) -> None:
    target = compared.target
    await compared.round()
    if also_before:
        target.run("os.pwrite(fd, b'before', 30 * PAGE)")
        assert await send_differing(compared.channel, compared.shared) == PAGE_BYTES
        await compared.round()
        assert await send_differing(compared.channel, compared.shared) == 0
    before = compared.link.pages()
    program, differing = UNSEEN[what]
    target.run(f"exec({program!r}, globals())")
    await compared.round(last=True)
    assert compared.link.pages() == before + differing
    assert compared.arrived() == content(target)


async def test_what_grows_arrives_whole(compared: Moving) -> None:
    target = compared.target
    await compared.round()
    target.run("os.ftruncate(fd, 600 * PAGE); os.pwrite(fd, b'z' * PAGE, 599 * PAGE)")
    await compared.round(last=True)
    (whole,) = (each for each in compared.link.messages if isinstance(each, HandedOver))
    assert whole.size == 600 * PAGE_BYTES
    assert compared.link.memory.content(whole.number, 599 * PAGE_BYTES, 1) == b"z" * PAGE_BYTES
    assert compared.arrived() == content(target)


async def test_of_one_that_nobody_has_mapped_any_more_nothing_counts_as_sent(compared: Moving) -> None:
    """CRIU sees it then (``hidden_pages``), and the image has all of it."""
    await compared.round()
    (each,) = compared.shared.compared()
    assert compared.shared.sent(each.number)
    compared.target.run(f"libc.munmap(start, {PAGES} * PAGE)")
    assert await send_differing(compared.channel, compared.shared) == 0
    answers = compared.tree.collect(last=True).values()
    assert not list(compared.shared.round(answers))
    forget_differing(compared.shared)
    assert not compared.shared.sent(each.number)
    assert not worth_hiding(answers)


@pytest.mark.parametrize("kept", [False, True])
async def test_what_ends_within_a_page_arrives_to_its_last_byte(kept: bool) -> None:
    size = PAGES * PAGE_BYTES - 100
    with Target() as target:
        target.run(f"globals().update(fd=os.memfd_create('m')); os.pwrite(fd, b'a' * {size}, 0)")
        target.run(f"(start := area({PAGES}, SHARED, fd)); put(start, 1, 5)")
        if not kept:
            target.run("os.close(fd)")
        moving = Moving(target)
        await moving.round()
        target.run(f"put(start + {PAGES - 1} * PAGE, 2)")
        await moving.round(last=True)
        assert moving.arrived()[:size] == content(target)[:size]
        (whole,) = (each for each in moving.link.messages if isinstance(each, HandedOver))
        assert whole.size == size
        moving.tree.close()
        await moving.link.memory.close()


async def test_one_that_gets_a_descriptor_again_is_compared_with_nothing(compared: Moving) -> None:
    """What was sent of it before has no digests, and nothing else tells of what is written from then on."""
    target = compared.target
    target.run("os.close(fd)")
    await compared.round()
    await compared.round()
    span = f"{target.run('start'):x}-{target.run('start') + PAGES * PAGE_BYTES:x}"
    target.run(f"globals().update(fd=os.open('/proc/self/map_files/{span}', os.O_RDWR))")
    await compared.round()
    target.run("os.pwrite(fd, b'z', 9 * PAGE)")
    await compared.round()
    await compared.round(last=True)
    assert compared.arrived() == content(target)


async def test_one_that_is_made_while_all_are_asked_is_not_taken_for_closed() -> None:
    """Its descriptor was not there when they were looked up."""
    with Target() as target:
        moving = Moving(target)
        before = moving.tree._memfds.untouched

        def untouched(pids: Iterable[int]) -> frozenset[int]:
            found = before(pids)
            target.run(f"globals().update(fd=os.memfd_create('m')); os.ftruncate(fd, {PAGES} * PAGE)")
            target.run(f"(start := area({PAGES}, SHARED, fd)); put(start, 1, {PAGES})")
            return found

        moving.tree._memfds.untouched = untouched  # type: ignore[method-assign]
        await moving.round()
        moving.tree._memfds.untouched = before  # type: ignore[method-assign]
        target.run("os.pwrite(fd, b'z', 9 * PAGE); os.close(fd)")
        await moving.round(last=True)
        assert moving.arrived() == content(target)
        moving.tree.close()
        await moving.link.memory.close()
