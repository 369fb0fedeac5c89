"""The service network of a workload that has a network namespace of its own: interface, addresses and MAC are inside.

Gate, hold, announcements and the inventory work as on a host, but inside that namespace: its packets come to it
through the host's bridge, or past the host altogether (docs/decisions/0010). Sockets stay in the namespace they were
made in; so all that is needed is to make them there. The connection table is the host's, through whose bridge a
firewall may look.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from coordinator.agent.network import NetfixNetwork, network_errors
from coordinator.errors import NetworkChangeFailed
from coordinator.facts import NamespaceFacts, SocketFacts
from netfix import namespace
from netfix.attachment import Attachment, Route, add, delete, raise_up
from netfix.conntrack_entry import Connection
from netfix.gate import GateState
from netfix.hold import HoldReport
from netfix.movers.base import AddressMover
from netfix.sockets import SocketRecord


class NamespacedNetwork:
    """See ``ServiceNetwork``. ``make`` puts the parts together, and is called inside the namespace when it is there.

    Where it is not there any more, there is nothing left to close or to remove: those verbs are done then. ``outside``:
    the mover, if it works on the host or on a router, whatever has become of the namespace. Inside, the segment is told
    all the same: with the MAC that the peers know, it is the switches that learn, and the bridge of a host that is a
    router's next hop is one of them."""

    def __init__(
        self,
        facts: NamespaceFacts,
        parent: str,
        make: Callable[[], NetfixNetwork],
        outside: AddressMover | None = None,
    ) -> None:
        self._path = Path(facts.path)
        self._attachment = replace(attachment_of(facts), parent=parent)
        self._make = make
        self._outside = outside
        self._made: NetfixNetwork | None = None

    @property
    def _inside(self) -> NetfixNetwork:
        if self._made is None:
            with network_errors(), namespace.entered(self._path):
                self._made = self._make()
        return self._made

    @property
    def _is_gone(self) -> bool:
        return self._made is None and not self._path.exists()

    @property
    def _movers(self) -> list[AddressMover | NetfixNetwork]:
        """Who does a mover's verbs, as far as they are there, in their order."""
        return [*([] if self._is_gone else [self._inside]), *([] if self._outside is None else [self._outside])]

    async def check_namespace(self) -> None:
        """See ``ServiceNetwork``. What is there was not made by us, and stays."""
        if self._path.exists():
            raise NetworkChangeFailed(
                f"this host has a network namespace {self._path} already",
                f"Remove it if nothing uses it: ip netns delete {self._path.name}",
            )

    async def make_namespace(self) -> None:
        """See ``ServiceNetwork``."""
        with network_errors():
            namespace.create(self._path)
            add(self._path, self._attachment)

    async def remove_namespace(self) -> None:
        """See ``ServiceNetwork``. Our own sockets would keep it."""
        await self.close()
        with network_errors():
            delete(self._path, self._attachment.interface)
            namespace.remove(self._path)

    async def set_gate(self, state: GateState) -> None:
        """See ``ServiceNetwork``."""
        if state.answering or not self._is_gone:
            await self._inside.set_gate(state)

    async def remove_gate(self) -> None:
        """See ``ServiceNetwork``."""
        if not self._is_gone:
            await self._inside.remove_gate()

    async def open_hold(self) -> None:
        """See ``ServiceNetwork``."""
        inside = self._inside
        with network_errors(), namespace.entered(self._path):
            await inside.open_hold()  # which awaits nothing that waits

    async def hold_arrivals(self) -> None:
        """See ``ServiceNetwork``."""
        await self._inside.hold_arrivals()

    async def kept(self, sockets: Collection[SocketFacts]) -> list[bytes]:
        """See ``ServiceNetwork``."""
        return await self._inside.kept(sockets)

    async def take_in(self, packets: Sequence[bytes], sockets: Collection[SocketFacts]) -> None:
        """See ``ServiceNetwork``."""
        await self._inside.take_in(packets, sockets)

    async def let_out(self) -> None:
        """See ``ServiceNetwork``."""
        await self._inside.let_out()

    async def release_arrivals(self) -> HoldReport:
        """See ``ServiceNetwork``."""
        return await self._inside.release_arrivals()

    async def drop_arrivals(self) -> None:
        """See ``ServiceNetwork``."""
        if self._made is not None:
            await self._made.drop_arrivals()

    async def add_addresses(self) -> None:
        """See ``ServiceNetwork``."""
        with network_errors():
            raise_up(self._path, self._attachment)

    async def remove_addresses(self) -> None:
        """See ``ServiceNetwork``."""
        with network_errors():
            delete(self._path, self._attachment.interface)

    async def divert(self) -> None:
        """See ``ServiceNetwork``."""
        with network_errors():
            for mover in self._movers or [self._inside]:
                await mover.divert()

    async def back(self) -> None:
        """See ``ServiceNetwork``."""
        with network_errors():
            for mover in self._movers:
                await mover.back()

    async def released(self, peers: Collection[str]) -> tuple[str, ...]:
        """See ``ServiceNetwork``."""
        with network_errors():
            return tuple([warning for mover in self._movers for warning in await mover.released(peers)])

    async def finished(self) -> None:
        """See ``ServiceNetwork``. A mover outside leaves nothing to the background."""
        if self._made is not None:
            await self._made.finished()

    async def sockets(self, root_pid: int) -> tuple[SocketFacts, ...]:
        """See ``ServiceNetwork``."""
        return await self._inside.sockets(root_pid)

    async def pending(self, root_pid: int) -> list[SocketRecord]:
        """See ``ServiceNetwork``."""
        return await self._inside.pending(root_pid)

    async def tracked_connections(self) -> list[Connection]:
        """See ``ServiceNetwork``."""
        return await self._inside.tracked_connections()

    async def track_connections(self, connections: Sequence[Connection]) -> None:
        """See ``ServiceNetwork``."""
        await self._inside.track_connections(connections)

    async def forget_connections(self) -> None:
        """See ``ServiceNetwork``."""
        if not self._is_gone:
            await self._inside.forget_connections()

    async def close(self) -> None:
        """See ``ServiceNetwork``."""
        if self._made is not None:
            await self._made.close()
            self._made = None


def attachment_of(facts: NamespaceFacts) -> Attachment:
    """What netfix makes of the facts."""
    values = {name: getattr(facts, name) for name in Attachment.__dataclass_fields__}
    names = tuple(Route.__dataclass_fields__)
    values["routes"] = tuple(Route(**{name: getattr(each, name) for name in names}) for each in facts.routes)
    return Attachment(**values)
