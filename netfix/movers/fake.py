"""An address mover in memory, for tests."""

from collections.abc import Collection

from .base import MoverFailedError, Role


class FakeWay:
    """What both ends change: `attracting` are the hosts' roles that draw packets; at the beginning the source does."""

    def __init__(self) -> None:
        self.attracting: set[Role] = {"source"}


class FakeMover:
    """See `AddressMover`. `fail_next`: the next verb does its part and fails then, as a hook does whose last command
    fails."""

    def __init__(self, role: Role, way: FakeWay) -> None:
        self._role = role
        self._way = way
        self.history: list[str] = []
        self.fail_next = False

    async def divert(self) -> None:
        """See `AddressMover`."""
        await self._attract("divert", self._role == "destination")

    async def back(self) -> None:
        """See `AddressMover`."""
        await self._attract("back", self._role == "source")

    async def released(self, peers: Collection[str]) -> tuple[str, ...]:
        """See `AddressMover`."""
        await self._do("released")
        return ()

    async def hush(self) -> None:
        """See `AddressMover`."""

    async def finished(self) -> None:
        """See `AddressMover`."""

    async def close(self) -> None:
        """See `AddressMover`."""

    async def _attract(self, verb: str, here: bool) -> None:
        if here:
            self._way.attracting.add(self._role)
        else:
            self._way.attracting.discard(self._role)
        await self._do(verb)

    async def _do(self, verb: str) -> None:
        self.history.append(verb)
        failing, self.fail_next = self.fail_next, False
        if failing:
            raise MoverFailedError(f"{verb} as {self._role}: told to fail")
