"""An image space in memory, and its hold."""

from __future__ import annotations

import asyncio
from collections.abc import Container, Iterable
from pathlib import Path

from coordinator.agent.fakes.world import Life, Machine
from coordinator.agent.images import INVENTORY, ImageHold
from coordinator.errors import CommandFailed, NotEnoughSpace, ProtocolError


class FakeImageHold:
    """An ``ImageHold`` in memory. A restore, one of the ``readers``, waits for ``opened``: whether it may read."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.opened: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.readers: set[int] = set()

    def reached_by(self, pids: Iterable[int]) -> bool:
        """See ``ImageHold``."""
        return not self.readers.isdisjoint(pids)

    def complete(self) -> None:
        """See ``ImageHold``."""
        if INVENTORY not in (self._machine.files or {}):
            raise ProtocolError(f"there is no {INVENTORY} among the images")
        if not self.opened.done():
            self.opened.set_result(True)

    def release(self) -> None:
        """See ``ImageHold``."""
        if not self.opened.done():
            self.opened.set_result(False)


class FakeImageSpace:
    """An ``ImageSpace`` in the machine's memory."""

    images = Path("/fake/images")
    work = Path("/fake/work")

    def __init__(self, life: Life) -> None:
        self._life = life
        self._machine = life.machine
        self.written: dict[str, int] = {}

    async def create(self, size_bytes: int) -> None:
        """See ``ImageSpace``."""
        await self._life.verb("images create", NotEnoughSpace("no memory"))
        self._machine.files = {}
        await self._life.done(f"image space of {size_bytes} bytes")

    async def remove(self) -> None:
        """See ``ImageSpace``."""
        await self._life.verb("images remove", CommandFailed("umount: busy"))
        self._machine.files = None
        await self._life.done("no image space")

    def names(self) -> set[str]:
        """See ``ImageSpace``."""
        return set(self._files())

    def sizes(self, but: Container[str] = ()) -> dict[str, int]:
        """See ``ImageSpace``."""
        return {name: len(content) for name, content in self._files().items() if name not in but}

    def size(self, name: str) -> int:
        """See ``ImageSpace``."""
        return len(self._files()[name])

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See ``ImageSpace``."""
        return self._files()[name][offset : offset + size]

    def write(self, name: str, offset: int, data: bytes) -> None:
        """See ``ImageSpace``."""
        if "/" in name or name in (".", ".."):
            raise ProtocolError(f"an image named {name!r} was sent")
        before = self._files().get(name, b"")
        self._files()[name] = before[:offset].ljust(offset, b"\0") + data + before[offset + len(data) :]
        self.written[name] = max(self.written.get(name, 0), offset + len(data))

    def hold(self) -> ImageHold:
        """See ``ImageSpace``."""
        hold = FakeImageHold(self._machine)
        self._life.at_death.append(hold.release)
        return hold

    def _files(self) -> dict[str, bytes]:
        if self._machine.files is None:
            raise FileNotFoundError("there is no image space")
        return self._machine.files
