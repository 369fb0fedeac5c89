"""Finds and removes what an aborted migration left on this host, livemove's own or CRIU's: rules, tables, addresses.

Nothing of a live migration is touched, nor of one that could be finished. Spared are: a gate whose migration has a
journal here (`livemove recover` knows how it ends; removing the gate could make two hosts answer, invariant I2);
everything, while a hold is live on this host, because the removal of a hook would empty its queue (see `hold`); and
CRIU's rules while a process named criu runs.

A gate goes with the addresses that it keeps this host from answering for, if another host answers for them: then they
are here by mistake, and go first, behind the closed gate. If nobody else does, this host is where they belong.
"""

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .address import AddressBook, AddressRecord
from .gate import GateReport, find_gates, remove_gate, state_name
from .leftovers import Leftover, find_leftovers, remove_leftover
from .nfqueue import listened_to

STATE_DIR = Path("/var/lib/livemove")
"""Where livemove's journals are on a host, one directory a migration."""

Elsewhere = Callable[[AddressRecord], Awaitable[bool]]
"""Does another host on the segment answer for this address?"""


@dataclass(frozen=True, slots=True)
class Remnant:
    """Something left. `spared`: why it stays, empty if it would be removed; `addresses` go with it.

    `kind`: `gate`, or that of a `Leftover`; `subject` names it: the migration's id, or CRIU's table and chain.
    """

    kind: str
    subject: str
    detail: str
    spared: str
    addresses: tuple[AddressRecord, ...] = ()
    leftover: Leftover | None = None


def judge(
    gates: Sequence[GateReport], leftovers: Sequence[Leftover], *, journaled: set[str], listeners: set[int], criu: bool
) -> list[Remnant]:
    """What is a remnant, and what of it is spared. Pure; without the addresses."""
    holding = next((gate.migration_id for gate in gates if gate.state.queue in listeners), "")
    found = []
    for gate in gates:
        ident = gate.migration_id
        spared = f"the hold of {holding} is live on this host" if holding else ""
        if ident in journaled:
            spared = f"livemove has a journal of it: livemove recover {ident}"
        detail = f"gate {ident}, {state_name(gate.state)}, for {' '.join(gate.addresses) or 'no address'}"
        found.append(Remnant("gate", ident, detail, spared))
    for leftover in leftovers:
        if leftover.kind == "gate":
            continue
        spared = f"the hold of {holding} is live on this host" if holding else "criu runs on this host" if criu else ""
        subject = " ".join(part for part in (leftover.family, leftover.table, leftover.chain) if part)
        found.append(Remnant(leftover.kind, subject, leftover.detail, spared, leftover=leftover))
    return found


async def remnants(
    book: AddressBook, elsewhere: Elsewhere, *, state_dir: Path = STATE_DIR, proc: Path = Path("/proc")
) -> list[Remnant]:
    """What was left on this host, in the network namespace of the calling thread. Raises NetfixError."""
    gates = await find_gates()
    journaled = {path.name for path in state_dir.iterdir()} if state_dir.is_dir() else set()
    listeners = listened_to()
    found = judge(gates, await find_leftovers(), journaled=journaled, listeners=listeners, criu=_criu_runs(proc))
    addresses = {gate.migration_id: gate.addresses for gate in gates}
    result = []
    for remnant in found:
        misplaced = []
        if remnant.kind == "gate" and not remnant.spared:
            here = [record for address in addresses[remnant.subject] for record in await book.find(address)]
            misplaced = [record for record in here if await elsewhere(record)]
        result.append(replace(remnant, addresses=tuple(misplaced)))
    return result


def _criu_runs(proc: Path) -> bool:
    for name in proc.glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if name.read_text().strip() == "criu":
                return True
    return False


async def remove(remnant: Remnant, book: AddressBook) -> None:
    """Remove it, its addresses first; fine if it is gone already. Raises NetfixError."""
    for record in remnant.addresses:
        await book.remove(record)
    if remnant.leftover is not None:
        await remove_leftover(remnant.leftover)
    else:
        await remove_gate(remnant.subject)
