"""The mover for hosts of one Ethernet segment: gratuitous ARP and unsolicited neighbour advertisements.

Who does not answer is silent through its gate (`netfix.gate`): so of the two ends only the one that has the address now
says anything. After the move the destination looks whether the segment has followed.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

from ..errors import NetfixError
from ..frames import FramePort, announce
from ..neighbours import Neighbourhood
from ..questions import question
from .base import Role

ROUNDS = 3
"""How often the segment is told and asked, until it follows."""
ASK_S = 0.5
"""How long each question is listened for."""
_MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class Announcement:
    """An address with the ready frames that say that it is at `mac`, and those that ask who has it."""

    address: str
    mac: str
    frames: tuple[bytes, ...]
    probes: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Following:
    """What the segment made of one announcement: who else claims the address, who was asked, who acknowledged."""

    address: str
    others: frozenset[str]
    asked: frozenset[str]
    acknowledged: frozenset[str]

    @property
    def follows(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.others and self.asked == self.acknowledged

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against it, in words."""
        found = []
        if self.others:
            found.append(f"{_some(self.others)} answers for {self.address} as well: clients may go there")
        if missing := self.asked - self.acknowledged:
            found.append(
                f"the segment does not follow: {_some(missing)} did not acknowledge that {self.address} has moved,"
                " and may still send to the old host"
            )
        return tuple(found)


def _some(names: Collection[str]) -> str:
    first = sorted(names)[:_MOST_NAMED]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")


class L2Mover:
    """See the module, and `AddressMover`. `announcements` are those of the host that this end is on."""

    def __init__(
        self,
        role: Role,
        port: FramePort,
        announcements: Sequence[Announcement],
        neighbourhood: Neighbourhood,
        *,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._role = role
        self._port = port
        self._announcements = announcements
        self._neighbourhood = neighbourhood
        self._sleep = sleep
        self._repeats: asyncio.Task[None] | None = None

    async def divert(self) -> None:
        """See `AddressMover`. The destination announces; a burst is out when this returns."""
        if self._role == "destination":
            await self._announce()

    async def back(self) -> None:
        """See `AddressMover`. The source announces; a burst is out when this returns."""
        if self._role == "source":
            await self._announce()

    async def released(self, peers: Collection[str]) -> tuple[str, ...]:
        """See `AddressMover`. The destination announces again for those who missed it, and looks whether the segment
        follows: takes a second, up to three where it does not, or half a second an address if that is more."""
        if self._role == "source":
            return ()
        seen: list[Following] = []
        for _ in range(ROUNDS):
            await self._announce()
            try:
                seen = [await self._look(each, peers) for each in self._announcements]
            finally:
                await self.finished()
            if all(each.follows for each in seen):
                break
        return tuple(warning for each in seen for warning in each.warnings)

    async def hush(self) -> None:
        """See `AddressMover`."""
        if self._repeats is not None:
            self._repeats.cancel()
            await self._ended(self._repeats)

    async def finished(self) -> None:
        """See `AddressMover`. A repeat that failed is no failure: the burst went out."""
        if self._repeats is not None:
            await self._ended(self._repeats)

    async def close(self) -> None:
        """See `AddressMover`."""
        await self.hush()
        self._port.close()
        self._neighbourhood.close()

    async def _announce(self) -> None:
        frames = [frame for each in self._announcements for frame in each.frames]
        await announce(self._port, frames, repeats=0)
        await self.hush()
        self._repeats = asyncio.create_task(announce(self._port, frames, burst=0, sleep=self._sleep))

    async def _look(self, announced: Announcement, peers: Collection[str]) -> Following:
        address = announced.address
        neighbours = await self._neighbourhood.towards(address, peers)
        questions = {each: question(address, announced.mac, each) for each in neighbours}
        acknowledged = await self._port.ask(questions, address, ASK_S)
        others = await self._port.who(announced.probes, address, ASK_S)
        own = {announced.mac.lower()}
        return Following(address, frozenset(others - own), frozenset(questions), frozenset(acknowledged))

    async def _ended(self, task: asyncio.Task[None]) -> None:
        """Wait for the repeats' end, whatever it is; our own cancellation is none of theirs."""
        with contextlib.suppress(NetfixError):
            await asyncio.wait((task,))
            if not task.cancelled():
                task.result()
        self._repeats = None
