"""One suite for image spaces: the fake, and a real tmpfs (as root)."""

from __future__ import annotations

import asyncio
import os
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coordinator.agent.fakes.images import FakeImageSpace
from coordinator.agent.fakes.world import Life, World
from coordinator.agent.images import INVENTORY, ImageSpace, TmpfsImageSpace, memory_available_bytes
from coordinator.errors import NotEnoughSpace, ProtocolError
from tests.unit.agent.stage import make_plan

SIZE = 4 << 20


@pytest.fixture(params=["fake", "tmpfs"])
async def space(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ImageSpace]:
    if request.param == "fake":
        world = World(tmp_path, make_plan())
        yield FakeImageSpace(Life(world, world.source))
        return
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    real = TmpfsImageSpace("m-1", tmp_path / "run")
    yield real
    await real.remove()


async def test_images_are_written_in_parts_and_read_back(space: ImageSpace) -> None:
    await space.create(SIZE)
    assert space.sizes() == {}
    space.write("pages-1.img", 3, b"def")
    space.write("pages-1.img", 0, b"abc")
    space.write("empty.img", 0, b"")
    assert space.sizes() == {"pages-1.img": 6, "empty.img": 0}
    assert space.names() == {"pages-1.img", "empty.img"}
    assert space.written == space.sizes()
    assert space.sizes(("pages-1.img", "none.img")) == {"empty.img": 0}
    assert space.read("pages-1.img", 0, 100) == b"abcdef"
    assert space.read("pages-1.img", 4, 1) == b"e"
    assert space.read("pages-1.img", 6, 10) == b""
    space.write("pages-1.img", 1, b"X")
    assert space.read("pages-1.img", 0, 100) == b"aXcdef"


async def test_the_first_image_is_kept_aside_while_readers_are_held(space: ImageSpace) -> None:
    await space.create(SIZE)
    space.write(INVENTORY, 0, b"an older one")
    hold = space.hold()
    assert space.names() == {INVENTORY}
    space.write(INVENTORY, 0, b"some content")
    assert space.sizes() == {INVENTORY: 12}
    hold.complete()
    assert space.sizes() == {INVENTORY: 12}
    assert space.read(INVENTORY, 0, 100) == b"some content"
    hold.release()


async def test_images_without_the_first_are_not_complete(space: ImageSpace) -> None:
    await space.create(SIZE)
    hold = space.hold()
    space.write("core-1.img", 0, b"x")
    with pytest.raises(ProtocolError, match=INVENTORY):
        hold.complete()
    hold.release()
    hold.release()


async def test_what_did_not_fit_was_not_written(tmp_path: Path) -> None:
    """A write on a full tmpfs is a short one, and an error only if nothing fits."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    real = TmpfsImageSpace("m-1", tmp_path / "run")
    await real.create(64 << 10)
    try:
        real.write("pages-1.img", 0, bytes(SIZE))
        assert real.written == real.sizes()
        assert real.written["pages-1.img"] <= 64 << 10
    finally:
        await real.remove()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("early", [True, False])
async def test_real_only_a_reader_gets_all_of_the_first_image_or_nothing(
    tmp_path: Path, complete: bool, early: bool
) -> None:
    """Whether it comes before the images are complete or after it, and nothing if they never are."""
    real = TmpfsImageSpace("m-1", tmp_path / "run")
    await real.create(SIZE)
    hold = real.hold()
    real.write(INVENTORY, 0, b"inventory")
    command = ("cat", str(real.images / INVENTORY))
    readers = [await asyncio.create_subprocess_exec(*command, stdout=PIPE)] if early else []
    assert not hold.reached_by([])
    while early and not hold.reached_by([reader.pid for reader in readers]):  # noqa: ASYNC110 - nothing else tells
        await asyncio.sleep(0.01)
    if complete:
        hold.complete()
    hold.release()
    if not early:
        readers.append(await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=DEVNULL))
    for reader in readers:
        assert (await reader.communicate())[0] == (b"inventory" if complete else b"")
    await real.remove()


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "a/b", ".", ".."])
async def test_a_name_cannot_lead_elsewhere(space: ImageSpace, name: str) -> None:
    await space.create(SIZE)
    with pytest.raises(ProtocolError, match="image named"):
        space.write(name, 0, b"x")


async def test_removing_takes_everything_and_can_be_repeated(space: ImageSpace) -> None:
    await space.remove()
    await space.create(SIZE)
    space.write("core-1.img", 0, b"x")
    await space.remove()
    await space.remove()
    with pytest.raises(FileNotFoundError):
        space.sizes()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
async def test_real_only_nobody_else_can_read_it_and_nothing_is_left(tmp_path: Path) -> None:
    real = TmpfsImageSpace("m-1", tmp_path / "run")
    await real.create(SIZE)
    base = tmp_path / "run/m-1"
    assert base.is_mount()
    assert [path.stat().st_mode & 0o777 for path in (base, real.images, real.work)] == [0o700] * 3
    held = (real.work / "dump.log").open("w")  # as a CRIU in doubt does
    await real.remove()
    held.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
async def test_real_only_a_space_that_was_cut_short_can_be_removed(tmp_path: Path) -> None:
    (tmp_path / "run/m-1").mkdir(parents=True)
    other = tmp_path / "run/m-2"
    other.mkdir()
    await TmpfsImageSpace("m-1", tmp_path / "run").remove()
    assert list((tmp_path / "run").iterdir()) == [other]


async def test_real_only_no_memory_no_space(tmp_path: Path) -> None:
    real = TmpfsImageSpace("m-1", tmp_path / "run")
    with pytest.raises(NotEnoughSpace, match="MiB"):
        await real.create(1 << 60)
    assert list(tmp_path.iterdir()) == []


def test_free_memory_is_read_from_meminfo(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    assert memory_available_bytes(tmp_path / "meminfo") == 2 << 20
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\n")
    assert memory_available_bytes(tmp_path / "meminfo") == 0
