"""Files of the workload in the machines' memory, and the two ends that copy them."""

from __future__ import annotations

from typing import Any

from coordinator.agent.channel import Channel, expect
from coordinator.agent.fakes.world import Life
from coordinator.agent.messages import SyncBegin, SyncBytes, SyncEnded
from coordinator.errors import FilesChanged, FilesNotCopied, ProtocolError
from coordinator.events import Progress


class FakeFilesSource:
    """A ``FilesSource`` of the world's one volume."""

    wanted = True

    def __init__(self, life: Life) -> None:
        self._life = life
        self._machine = life.machine

    def claim(self) -> None:
        """See ``FilesSource``."""
        self._life.step("files claimed", OSError("the disk is full"))
        self._machine.left_over = False

    async def copy(self, link: Channel, progress: Progress) -> None:
        """See ``FilesSource``."""
        await self._send("files copied", link)

    async def catch_up(self, root_pid: int, link: Channel) -> None:
        """See ``FilesSource``."""
        await self._send("files caught up", link)

    async def last(self, root_pid: int, link: Channel) -> None:
        """See ``FilesSource``."""
        if self._machine.copy != "frozen":
            self._life.world.broken.append("the last pass was made with a service that runs")
        await self._send("last files", link)

    def check_untouched(self) -> None:
        """See ``FilesSource``."""
        self._life.step("files untouched", FilesChanged("somebody else wrote"))

    def leave(self) -> None:
        """See ``FilesSource``."""
        self._life.step("files left", OSError("the disk is full"))
        self._machine.left_over = True

    def close(self) -> list[str]:
        """See ``FilesSource``."""
        return []

    async def _send(self, verb: str, link: Channel) -> None:
        await self._life.verb(verb, FilesNotCopied("rsync failed"))
        await link.send(SyncBegin(tree=0, arguments=()))
        await link.send(SyncBytes(), str(self._machine.volume).encode())
        await expect(link, SyncEnded)


class FakeFilesTarget:
    """A ``FilesTarget`` of the world's one volume."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._machine = life.machine

    def look(self) -> list[dict[str, Any]]:
        """See ``FilesTarget``."""
        self._life.step("files looked at", FilesNotCopied("somebody's files are in the way"))
        return [{"kept": self._machine.left_over}]

    def make(self) -> None:
        """See ``FilesTarget``."""
        self._life.step("directories made", OSError("the disk is full"))
        self._machine.volume = self._machine.volume or 0

    async def receive(self, link: Channel, begin: SyncBegin) -> None:
        """See ``FilesTarget``."""
        await self._life.verb("files received", FilesNotCopied("no rsync"))
        message, payload = await link.receive()
        if not isinstance(message, SyncBytes):
            raise ProtocolError(f"the other half sent {type(message).__name__} in the middle of a pass")
        self._machine.volume = int(payload)
        await link.send(SyncEnded(status=0, said=""))

    async def remove(self, before: list[dict[str, Any]]) -> None:
        """See ``FilesTarget``."""
        await self._life.verb("files removed", OSError("busy"))
        if self._machine.copy != "absent":
            self._life.world.broken.append(f"files of a copy that is {self._machine.copy} are removed")
        if not before[0]["kept"]:
            self._machine.volume = None
        await self._life.done("files removed")

    def claim(self) -> None:
        """See ``FilesTarget``."""
        self._life.step("files claimed", OSError("the disk is full"))
        self._machine.left_over = False
