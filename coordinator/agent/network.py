"""The service addresses of one migration on one host: netfix's parts put together for the halves.

Invariant I2, "at most one host answers for the service address, and neither host ever sends a RST into a live
connection", is kept by the order in which the halves call these verbs; ``netfix.gate`` says what each state does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Protocol

from coordinator.agent.tasks import process_tree
from coordinator.errors import NetworkChangeFailed
from coordinator.facts import SocketFacts
from coordinator.protocol import AddressMove
from netfix.address import AddressBook, AddressRecord
from netfix.conntrack import ConnectionTable
from netfix.conntrack_entry import Connection, Flow, untracked
from netfix.delivery import Delivery
from netfix.errors import NetfixError, NoSuchInterfaceError
from netfix.gate import OPEN, Gate, GateState, holding, releasing
from netfix.hold import Hold, HoldReport
from netfix.movers.base import AddressMover
from netfix.segments import acknowledgements
from netfix.sockets import SocketInventory, SocketRecord, of_addresses, owned_by, socket_inodes


class ServiceNetwork(Protocol):
    """What a half can do to its host's network, for this migration's addresses only."""

    async def check_namespace(self) -> None:
        """Destination: raise ``NetworkChangeFailed`` if there is something where ``make_namespace`` would make it."""

    async def make_namespace(self) -> None:
        """Destination: make the workload's own network namespace, if it has one, with its interface down."""

    async def remove_namespace(self) -> None:
        """Remove the workload's own network namespace, which no task is in any more. Idempotent."""

    async def set_gate(self, state: GateState) -> None:
        """Let packets pass or not, and the host answer for the addresses or not, in one atomic change."""

    async def remove_gate(self) -> None:
        """Remove our tables: packets pass and the host answers. Idempotent."""

    async def open_hold(self) -> None:
        """Make ready to hold packets; takes some 20 ms, long before they come."""

    async def hold_arrivals(self) -> None:
        """The gate for a diverted destination: answer for the addresses, keep every packet that arrives, send none."""

    async def kept(self, sockets: Collection[SocketFacts]) -> list[bytes]:
        """Destination: what the peers of these connections have sent to it, without their data, oldest first. What was
        kept stays so."""

    async def take_in(self, packets: Sequence[bytes], sockets: Collection[SocketFacts]) -> None:
        """Source: give the kernel what came to the destination for these connections, and nothing else."""

    async def let_out(self) -> None:
        """The gate for the moment of resuming: what the tasks and the kernel send gets out, arrivals are still kept."""

    async def release_arrivals(self) -> HoldReport:
        """The gate opens: what was kept goes to the sockets, oldest first, and nothing overtakes it."""

    async def drop_arrivals(self) -> None:
        """Throw away what was kept, after an abort: peers send it again to the source. Idempotent."""

    async def add_addresses(self) -> None:
        """Put the addresses on the interface; the workload's own interface comes up with them. Idempotent."""

    async def remove_addresses(self) -> None:
        """Take the addresses off the interface; the workload's own interface goes with them. Idempotent."""

    async def divert(self) -> None:
        """Our part of bringing the addresses' packets to the destination (``AddressMover``). Undo: ``back``."""

    async def back(self) -> None:
        """Our part of bringing them to the source again. Idempotent; for l2, repeats go on in the background."""

    async def released(self, peers: Collection[str]) -> tuple[str, ...]:
        """The addresses stay at the destination: what an operator should know of it. Idempotent."""

    async def finished(self) -> None:
        """Return when what goes on in the background of these three is done."""

    async def sockets(self, root_pid: int) -> tuple[SocketFacts, ...]:
        """The sockets on the addresses or on the wildcard that belong to the process tree below ``root_pid``."""

    async def tracked_connections(self) -> list[Connection]:
        """What a firewall must know of the connections to and from the addresses: this host's own entries, and entries
        made up for the sockets that it does not track."""

    async def track_connections(self, connections: Sequence[Connection]) -> None:
        """Make those entries in this host's connection table."""

    async def forget_connections(self) -> None:
        """Remove the entries that name the addresses. Those of this host's own connections to the service stay, which
        go on wherever it is. Idempotent."""

    async def pending(self, root_pid: int) -> list[SocketRecord]:
        """Those of them, and of the kernel's own on the addresses, in which something waits (``is_pending``)."""

    async def close(self) -> None:
        """Let go of netlink and packet sockets; what was changed on the host stays."""


class NetfixNetwork:
    """The real ``ServiceNetwork``, and with netfix's fakes the one for unit tests.

    ``sockets_tracked``: the table is that of the network namespace in which the sockets are."""

    def __init__(
        self,
        interface: str,
        moves: Sequence[AddressMove],
        *,
        gate: Gate,
        book: AddressBook,
        mover: AddressMover,
        inventory: SocketInventory,
        hold: Hold,
        delivery: Delivery,
        table: ConnectionTable,
        inodes: Callable[[int], set[int]],
        sockets_tracked: bool = True,
    ) -> None:
        self._records = [AddressRecord(move.address, move.prefixlen, interface) for move in moves]
        self._gate = gate
        self._book = book
        self._mover = mover
        self._inventory = inventory
        self._hold = hold
        self._delivery = delivery
        self._table = table
        self._inodes = inodes
        self._sockets_tracked = sockets_tracked

    async def check_namespace(self) -> None:
        """See ``ServiceNetwork``: none is made."""

    async def make_namespace(self) -> None:
        """See ``ServiceNetwork``: the host's own is there."""

    async def remove_namespace(self) -> None:
        """See ``ServiceNetwork``: the host's own stays."""

    async def set_gate(self, state: GateState) -> None:
        """See ``ServiceNetwork``. Who answers no more does not announce any more either (I2)."""
        if not state.answering:
            await self._mover.hush()
        with network_errors():
            await self._gate.set(state)

    async def remove_gate(self) -> None:
        """See ``ServiceNetwork``."""
        with network_errors():
            await self._gate.remove()

    async def open_hold(self) -> None:
        """See ``ServiceNetwork``."""
        with network_errors():
            await self._hold.open()

    async def hold_arrivals(self) -> None:
        """See ``ServiceNetwork``. Where the kernel cannot hold, arrivals are dropped and peers send them again."""
        await self.set_gate(holding(self._hold.queue))

    async def kept(self, sockets: Collection[SocketFacts]) -> list[bytes]:
        """See ``ServiceNetwork``."""
        return self._hold.kept(_inward(sockets))

    async def take_in(self, packets: Sequence[bytes], sockets: Collection[SocketFacts]) -> None:
        """See ``ServiceNetwork``."""
        with network_errors():
            await self._delivery.deliver(acknowledgements(packets, _inward(sockets)))

    async def let_out(self) -> None:
        """See ``ServiceNetwork``."""
        await self.set_gate(releasing(self._hold.queue))

    async def release_arrivals(self) -> HoldReport:
        """See ``ServiceNetwork``."""
        with network_errors():
            return await self._hold.release(lambda: self._gate.set(OPEN))

    async def drop_arrivals(self) -> None:
        """See ``ServiceNetwork``."""
        with network_errors():
            await self._hold.discard()

    async def add_addresses(self) -> None:
        """See ``ServiceNetwork``."""
        with network_errors():
            for record in self._records:
                await self._book.add(record)

    async def remove_addresses(self) -> None:
        """See ``ServiceNetwork``."""
        with network_errors():
            for record in self._records:
                await self._book.remove(record)

    async def divert(self) -> None:
        """See ``ServiceNetwork``."""
        with network_errors():
            await self._mover.divert()

    async def back(self) -> None:
        """See ``ServiceNetwork``."""
        with network_errors():
            await self._mover.back()

    async def released(self, peers: Collection[str]) -> tuple[str, ...]:
        """See ``ServiceNetwork``."""
        with network_errors():
            return await self._mover.released(peers)

    async def finished(self) -> None:
        """See ``ServiceNetwork``."""
        await self._mover.finished()

    async def sockets(self, root_pid: int) -> tuple[SocketFacts, ...]:
        """See ``ServiceNetwork``."""
        with network_errors():
            records = await self._inventory.sockets()
        addresses = [record.address for record in self._records]
        return socket_facts(of_addresses(owned_by(records, self._inodes(root_pid)), addresses, wildcard=True))

    async def tracked_connections(self) -> list[Connection]:
        """See ``ServiceNetwork``. The addresses are the workload's alone, and with them all sockets on them."""
        addresses = [record.address for record in self._records]
        with network_errors():
            found = await self._table.connections(addresses)
            if not self._sockets_tracked:
                return found
            return [*found, *untracked(await self._inventory.sockets(), addresses, found)]

    async def track_connections(self, connections: Sequence[Connection]) -> None:
        """See ``ServiceNetwork``."""
        with network_errors():
            await self._table.create(connections)

    async def forget_connections(self) -> None:
        """See ``ServiceNetwork``."""
        addresses = [record.address for record in self._records]
        with network_errors():
            own: set[str] = set()
            with contextlib.suppress(NoSuchInterfaceError):  # the workload's own, and gone
                own = {record.address for record in await self._book.on_interface(self._records[0].interface)}
            await self._table.remove(addresses, own - set(addresses))

    async def pending(self, root_pid: int) -> list[SocketRecord]:
        """See ``ServiceNetwork``. An address that moves is the workload's alone; only what is bound to all of them may
        be somebody else's, and to find that out can take longer than the look itself."""
        addresses = [record.address for record in self._records]
        with network_errors():
            records = await self._inventory.pending(addresses)
            own = of_addresses(records, addresses)
            anywhere = [record for record in records if record not in own]
            return own + (owned_by(anywhere, self._inodes(root_pid)) if anywhere else [])

    async def close(self) -> None:
        """See ``ServiceNetwork``."""
        await self._mover.close()
        for part in (self._hold, self._delivery, self._gate, self._book, self._inventory, self._table):
            part.close()


def _inward(sockets: Collection[SocketFacts]) -> list[Flow]:
    """The way of what their peers send."""
    return [Flow(each.remote, each.remote_port, each.local, each.local_port) for each in sockets]


def socket_facts(records: Sequence[SocketRecord]) -> tuple[SocketFacts, ...]:
    """The sockets as facts for a message, in a stable order; of those that share a port (SO_REUSEPORT) each one."""
    facts = [
        SocketFacts(
            family=record.family,
            protocol=record.protocol,
            state=record.state,
            local=record.local,
            local_port=record.local_port,
            remote=record.remote,
            remote_port=record.remote_port,
        )
        for record in records
    ]
    return tuple(sorted(facts, key=lambda s: (s.protocol, s.local, s.local_port, s.remote, s.remote_port)))


def tree_socket_inodes(root_pid: int) -> set[int]:
    """Inodes of all sockets that the process tree below ``root_pid`` has open."""
    return socket_inodes(process_tree(root_pid))


@contextlib.contextmanager
def network_errors() -> Iterator[None]:
    try:
        yield
    except NetfixError as error:
        raise NetworkChangeFailed(error.message, error.hint or None) from error
