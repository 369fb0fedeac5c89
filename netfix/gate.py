"""The gate of a migration on a host: does it answer for the service addresses, and do their packets pass?

Invariant I2 is kept here: **at most one host answers for the service address, and neither host ever sends a RST into a
live connection.** Answering and passing are separate, because the two change hands at different instants:

=========  ===========  =========  ==========================================================================
state      `answering`  `passing`  where it is used
=========  ===========  =========  ==========================================================================
`OPEN`     yes          yes        normal life
`SILENT`   no           yes        source, diverted: still running, finishes what it had received
`FREEZING` no           no, but    source, while its tasks are being frozen and after: UDP from the addresses leaves
                        UDP out
`CLOSED`   no           no         destination before it is announced
`HOLDING`  yes          no         destination, diverted: the segment's packets come here and find no socket yet
=========  ===========  =========  ==========================================================================

With another field, `queue`, what comes in goes into that NFQUEUE, for a `hold` to keep and let go: `holding(number)`
is HOLDING that keeps instead of dropping, `releasing(number)` lets packets out while what comes in still queues up
(but no RST for a segment that nobody knows, see `gate_rules`).

What that means packet by packet is in `gate_rules`.

Frames from a packet socket (our announcements and probes) do not pass nftables, and so leave in every state.

The two tables of a gate, `inet livemove-ID` and `arp livemove-ID`, change in one nf_tables transaction. All that have
no queue's number in them are put together when the gate is made: `set` is one `send()` and one `recv()`, and never
waits; but that the first state with a queue waits for another gate that is being removed (`hooks`).

Measured (Linux 6.18, 2 cores, one IPv4 and one IPv6 address, medians): making a gate 20 ms, to be done before the
freeze; `set` to closed 0.14 ms (99 % under 0.2 ms), holding 0.09 ms, silent 0.07 ms, open 0.01 ms; `state` 0.08 ms.
With a queue: `holding(number)` 4 to 60 ms where the kernel lacks nft's own `queue` expression (see `NftGate._encode`;
it belongs before the freeze), `releasing(number)` after it 0.14 ms.

A limit: whoever runs `nft flush ruleset` on the host (a restart of its firewall) opens the gate. Tables that others
cannot flush (NFT_TABLE_F_OWNER) end with their socket, and a gate must outlive a killed agent.
"""

import contextlib
import errno
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from . import nft
from .errors import GateAlteredError, KernelLacksError, KernelRefusedError, UsageError, from_errno
from .gate_rules import (
    CHAINS,
    DATAGRAM_MARK,
    FAMILIES,
    QUEUE_MARK,
    SHUT_MARK,
    SILENT_MARK,
    Address,
    GateRule,
    Queue,
    ruleset,
)
from .hooks import Hooks
from .netlink import NETLINK_NETFILTER, NetlinkSocket, Refusal
from .unicast import parse_address

TABLE_PREFIX = "livemove-"
"""Every table of ours begins so; what follows is the migration's id."""

QUEUEING = ((nft.INET, "prerouting"),)
"""The chains that send packets to a queue."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class GateState:
    """`answering`: ARP and neighbour solicitations for the addresses; `passing`: packets to and from them.

    `datagrams`: UDP from the addresses leaves all the same: a task that is not frozen yet cannot send it again.
    `queue`: the number of an NFQUEUE that inbound packets go to, whether `passing` or not; `passing` is then said of
    outbound ones alone. Where nobody has bound that queue the kernel drops them.
    """

    answering: bool
    passing: bool
    queue: int | None = None
    datagrams: bool = False


OPEN = GateState(answering=True, passing=True)
SILENT = GateState(answering=False, passing=True)
FREEZING = GateState(answering=False, passing=False, datagrams=True)
CLOSED = GateState(answering=False, passing=False)
HOLDING = GateState(answering=True, passing=False)
STATES = {"open": OPEN, "silent": SILENT, "freezing": FREEZING, "closed": CLOSED, "holding": HOLDING}


def holding(queue: int | None) -> GateState:
    """HOLDING with what comes in kept in that queue; without one, it is dropped."""
    return replace(HOLDING, queue=queue)


def releasing(queue: int | None) -> GateState:
    """OPEN but that what comes in still goes through that queue; without one, OPEN."""
    return replace(OPEN, queue=queue)


def state_name(state: GateState) -> str:
    """`open`, `silent`, `freezing`, `closed`, `holding` or `releasing`."""
    if state.passing and state.queue is not None:
        return "releasing"
    return next(name for name, known in STATES.items() if known == replace(state, queue=None))


class Gate(Protocol):
    """The gate of one migration on one host, for the service addresses it was made with."""

    async def set(self, state: GateState) -> None:
        """Make this the state, at one instant for all addresses and both families, whatever it was before.

        Effect: our two tables exist and hold the rules of `state`. On an error nothing has changed.
        Undo: set the former state, or `remove` if there was none. Raises NotPermittedError, KernelRefusedError.
        """

    async def state(self) -> GateState | None:
        """What the kernel has: None where there is no gate. Raises GateAlteredError if the rules are not ours."""

    async def remove(self) -> None:
        """Remove the tables with all their rules; idempotent. From here on the host answers and packets pass: at once,
        though the empty tables stay until no other migration here queues packets (`hooks`: ten seconds at most).

        On the host that a service has left: first see that its sockets are gone (`sockets.of_addresses`), then remove
        the address, then the gate. Linux goes on sending for an IPv6 socket whose address is no longer there.
        """

    def close(self) -> None:
        """Let go of the sockets; the gate stays as it is. Idempotent."""


class GateReport(NamedTuple):
    """A gate found on this host: its migration, the state its rules amount to, and the addresses they name.

    An open gate has no rules, and so names no addresses.
    """

    migration_id: str
    state: GateState
    addresses: tuple[str, ...]


def table_name(migration_id: str) -> str:
    """The name of a migration's tables. Raises UsageError for an id that could not be one."""
    if not _ID.fullmatch(migration_id):
        raise UsageError(
            f"migration id {migration_id!r} is not valid",
            hint="up to 64 letters, digits, '.', '_' or '-', the first a letter or digit",
        )
    return TABLE_PREFIX + migration_id


def _service_addresses(addresses: Sequence[str]) -> list[Address]:
    if not addresses:
        raise UsageError("a gate needs at least one address", hint="name the service address, e.g. 192.0.2.10")
    return [parse_address(address) for address in dict.fromkeys(addresses)]


# --- the real one ----------------------------------------------------------------------------------------------------


def _made(table: str) -> list[bytes]:
    """Messages after which the tables exist with their chains; what is there stays."""
    tables = [nft.new_table(family, table) for family in FAMILIES]
    return tables + [nft.new_base_chain(family, table, *chain) for family, *chain in CHAINS]  # type: ignore[arg-type]


def _flushes(table: str) -> dict[tuple[int, str], bytes]:
    return {(family, name): nft.flush_rules(family, table, name) for family, name, *_ in CHAINS}


async def _remove(netlink: NetlinkSocket, hooks: Hooks, table: str) -> None:
    """Open the gate at once, and remove its tables when nobody queues packets (see `hooks`).

    Made and deleted, so that it does not matter whether they exist, on kernels without "destroy" (6.3) too."""
    made = _made(table)
    deleted = [nft.delete_table(nft.INET, table), nft.delete_table(nft.ARP, table, nft.ACKNOWLEDGE)]
    with _kernel_errors(f"gate {table}"):
        netlink.transact(nft.batch([*made, *_flushes(table).values(), nft.new_table(nft.INET, table, nft.ACKNOWLEDGE)]))
        async with hooks.alone():
            netlink.transact(nft.batch([*made, *deleted]))


class NftGate:
    """The gate in nf_tables, in the network namespace of the thread that makes it. See `Gate`."""

    def __init__(self, migration_id: str, addresses: Sequence[str], *, alone: bool = False) -> None:
        """Encode the rules, see what the kernel can do; nothing is changed yet (some tens of milliseconds).

        `alone`: this namespace is the service's alone (see `gate_rules`). Raises UsageError, InvalidAddressError,
        NotPermittedError, KernelLacksError.
        """
        self._table = table_name(migration_id)
        self._addresses = _service_addresses(addresses)
        self._alone = alone
        self._rules: dict[str, bytes] = {}
        self._transactions: dict[tuple[GateState, bool], bytes] = {}
        self._last: GateState | None = None
        self._before, self._flushes = _made(self._table), _flushes(self._table)
        # A second look at a table that is there is the cheapest last message to have acknowledged.
        self._after = nft.new_table(nft.INET, self._table, nft.ACKNOWLEDGE)
        self._hooks = Hooks()
        self._netlink = NetlinkSocket(NETLINK_NETFILTER, f"gate {self._table}")
        with _kernel_errors(f"gate {self._table}"):
            self._form = nft.queue_form(self._netlink)
        queued = (holding(0), releasing(0)) if self._form != nft.NO_QUEUE else ()
        for state in (*STATES.values(), *queued):
            self._encode(state)

    async def set(self, state: GateState) -> None:
        if state.queue is not None and self._form == nft.NO_QUEUE:
            raise KernelLacksError(f"gate {self._table}: this kernel's rules cannot queue packets")
        if state.queue is not None:
            await self._hooks.keep()
        with _kernel_errors(f"gate {self._table}"):
            self._netlink.transact(self._encode(state))
        self._last = state
        if state.queue is None:
            self._hooks.let_go()
        elif not state.passing:  # what comes next, in a moment in which nobody waits
            self._encode(releasing(state.queue))

    async def remove(self) -> None:
        await _remove(self._netlink, self._hooks, self._table)
        self._last = None

    async def state(self) -> GateState | None:
        families = {family for family, name in _tables(self._netlink) if name == self._table}
        if not families:
            return None
        rules = [rule for family in FAMILIES for rule in nft.rules(self._netlink, family, self._table)]
        state = _amounts_to(rule.comment for rule in rules)[0]
        expected = sorted((rule.family, rule.chain, rule.comment) for rule in self._ruleset(state))
        if families != set(FAMILIES) or expected != sorted((rule.family, rule.chain, rule.comment) for rule in rules):
            raise GateAlteredError(f"gate {self._table}: its rules are those of no state that livemove sets")
        return state

    def _ruleset(self, state: GateState) -> list[GateRule]:
        queue = None if state.queue is None else Queue(state.queue, self._form)
        values = {"answering": state.answering, "passing": state.passing, "datagrams": state.datagrams}
        return ruleset(self._addresses, queue=queue, alone=self._alone, **values)

    def _encode(self, state: GateState) -> bytes:
        """The transaction that makes `state` the state, ready after the first time: to put one together takes 1 ms.

        What exists is kept, and all rules are replaced. All but those of a chain that queues, and goes on to do so: to
        make a `target` rule, the kernel waits until all rules removed before are destroyed, which takes it 10 to 60 ms
        (net/netfilter/nft_compat.c).
        """
        goes_on = self._last is not None and state.queue is not None and _inbound(self._last) == _inbound(state)
        if (state, goes_on) not in self._transactions:
            self._transactions[state, goes_on] = self._transaction(state, QUEUEING if goes_on else ())
        return self._transactions[state, goes_on]

    def _transaction(self, state: GateState, kept: Sequence[tuple[int, str]]) -> bytes:
        messages = [flush for chain, flush in self._flushes.items() if chain not in kept]
        for rule in self._ruleset(state):
            if (rule.family, rule.chain) in kept:
                continue
            key = repr(rule)
            if key not in self._rules:  # to encode one takes some 0.3 ms
                family, chain, expressions, comment = rule
                self._rules[key] = nft.new_rule(family, self._table, chain, expressions, comment)
            messages.append(self._rules[key])
        return nft.batch([*self._before, *messages, self._after])

    def close(self) -> None:
        self._netlink.close()
        self._hooks.close()


def _inbound(state: GateState) -> tuple[bool, int | None]:
    """What the rules of a chain that queues depend on."""
    return state.answering, state.queue


@contextlib.contextmanager
def _kernel_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except Refusal as refusal:
        raise from_errno(refusal.number, doing, refusal.detail) from refusal


def _tables(netlink: NetlinkSocket) -> list[nft.Table]:
    try:
        with _kernel_errors("reading nftables"):
            return nft.tables(netlink)
    except KernelRefusedError as error:
        if isinstance(error.__cause__, Refusal) and error.__cause__.number == errno.ENOENT:
            return []
        raise


def _amounts_to(comments: Iterable[str]) -> tuple[GateState, tuple[str, ...]]:
    """The state that rules with these comments amount to, and the addresses they name."""
    words = [comment.split(" ") for comment in comments]
    kinds = {kind for kind, *_ in words}
    addresses = dict.fromkeys(rest[0] for kind, *rest in words if kind in (SILENT_MARK, SHUT_MARK, QUEUE_MARK))
    queue = next((int(number) for kind, *rest in words if kind == QUEUE_MARK for number in rest[1:]), None)
    silent, shut, datagrams = (mark in kinds for mark in (SILENT_MARK, SHUT_MARK, DATAGRAM_MARK))
    return GateState(answering=not silent, passing=not shut, queue=queue, datagrams=datagrams), tuple(addresses)


async def find_gates() -> list[GateReport]:
    """All gates on this host, of any migration, as far as their rules tell. Raises NotPermittedError."""
    with NetlinkSocket(NETLINK_NETFILTER, "reading nftables") as netlink:
        names = sorted({name for _, name in _tables(netlink) if name.startswith(TABLE_PREFIX)})
        with _kernel_errors("reading nftables"):
            rules = nft.rules(netlink) if names else []
    return [
        GateReport(name.removeprefix(TABLE_PREFIX), *_amounts_to(rule.comment for rule in rules if rule.table == name))
        for name in names
    ]


async def remove_gate(migration_id: str) -> None:
    """Remove a migration's gate without knowing its addresses; idempotent. For operators and for recovery."""
    table = table_name(migration_id)
    with NetlinkSocket(NETLINK_NETFILTER, f"gate {table}") as netlink, closing(Hooks()) as hooks:
        await _remove(netlink, hooks, table)


# --- the fake --------------------------------------------------------------------------------------------------------


class FakeGate:
    """A gate in memory, for tests. `history` has every state it was set to, and None for a removal.

    `kernel` is what survives the object: hand the same mapping to two fakes to look at one host twice.
    `fail_next` is raised by the next change, which then does not happen.
    """

    def __init__(self, migration_id: str, addresses: Sequence[str], kernel: dict[str, GateState] | None = None) -> None:
        self._table = table_name(migration_id)
        _service_addresses(addresses)
        self.kernel = {} if kernel is None else kernel
        self.history: list[GateState | None] = []
        self.fail_next: Exception | None = None
        self.closed = False

    def _change(self, state: GateState | None) -> None:
        failure, self.fail_next = self.fail_next, None
        if failure is not None:
            raise failure
        self.history.append(state)
        if state is None:
            self.kernel.pop(self._table, None)
        else:
            self.kernel[self._table] = state

    async def set(self, state: GateState) -> None:
        self._change(state)

    async def state(self) -> GateState | None:
        return self.kernel.get(self._table)

    async def remove(self) -> None:
        self._change(None)

    def close(self) -> None:
        self.closed = True
