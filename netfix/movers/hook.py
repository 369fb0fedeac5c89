"""The mover for every other way: an executable of the operator's, run on both hosts (docs/movers.md is its manual)."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Literal

from .base import Commands, MoverFailedError, MovingAddress, Role

Action = Literal["divert", "back", "released"]


@dataclass(frozen=True, slots=True)
class HookMove:
    """What a hook is told of the move it takes part in: names and ids as livemove's configuration has them."""

    migration: str
    workload: str
    source: str
    destination: str
    interface: str


class HookMover:
    """See the module, and `AddressMover`. `deadline_s` bounds each verb, over all addresses, in seconds."""

    def __init__(
        self,
        role: Role,
        path: str,
        move: HookMove,
        addresses: Sequence[MovingAddress],
        run: Commands,
        *,
        deadline_s: float,
    ) -> None:
        self._role = role
        self._path = path
        self._move = move
        self._addresses = addresses
        self._run = run
        self._deadline_s = deadline_s

    async def divert(self) -> None:
        """See `AddressMover`."""
        await self._all("divert")

    async def back(self) -> None:
        """See `AddressMover`."""
        await self._all("back")

    async def released(self, peers: Collection[str]) -> tuple[str, ...]:
        """See `AddressMover`. That it fails here is a warning: the move is over."""
        try:
            await self._all("released")
        except MoverFailedError as error:
            return (error.message,)
        return ()

    async def hush(self) -> None:
        """See `AddressMover`."""

    async def finished(self) -> None:
        """See `AddressMover`."""

    async def close(self) -> None:
        """See `AddressMover`."""

    async def _all(self, action: Action) -> None:
        until = monotonic() + self._deadline_s
        for each in self._addresses:
            ran = await self._run([self._path], self._environment(action, each), max(until - monotonic(), 0.0))
            if ran.status:
                raise MoverFailedError(
                    f"{self._path} {action} {each.address} as {self._role}: exit status {ran.status}: {ran.said}",
                    hint="the hook's own words say why; docs/movers.md says what it is asked to do",
                )

    def _environment(self, action: Action, each: MovingAddress) -> dict[str, str]:
        return {
            "LIVEMOVE_ACTION": action,
            "LIVEMOVE_ROLE": self._role,
            "LIVEMOVE_ADDRESS": each.address,
            "LIVEMOVE_PREFIXLEN": str(each.prefixlen),
            "LIVEMOVE_INTERFACE": self._move.interface,
            "LIVEMOVE_FROM": self._move.source,
            "LIVEMOVE_TO": self._move.destination,
            "LIVEMOVE_FROM_NEXT_HOP": each.from_next_hop,
            "LIVEMOVE_TO_NEXT_HOP": each.to_next_hop,
            "LIVEMOVE_WORKLOAD": self._move.workload,
            "LIVEMOVE_MIGRATION": self._move.migration,
        }


def hook_problem(path: str) -> str:
    """Why there is no hook on this host that could be run at that path, or nothing."""
    if not Path(path).is_file():
        return f"{path} is no file" if Path(path).exists() else f"{path} is missing"
    return "" if os.access(path, os.X_OK) else f"{path} is not executable"
