"""Before the freeze: nothing of the service's connections may be where a dump does not find it.

CRIU dumps the sockets that processes have, with what is in their TCP queues. It refuses to dump while a connection
waits in an accept queue, and loses the datagrams in UDP's queues. A connection that the service has closed, or that is
still shaking hands, belongs to no process: its peer's packets have to reach this host to end it, so it is waited for
*before* the packets are diverted. The rest is worked off *after* that, when nothing new can come; and of a busy service
something is always unfinished at that instant: its peers' packets are fetched from the destination (``handing_back``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

from coordinator.errors import NotAccepting
from coordinator.protocol import Deadlines
from netfix.sockets import SocketRecord

#: What was on its way to us when the destination began to answer is here after this. On a segment that is one packet's
#: way there and back, some 0.2 ms; the rest is for interrupts that network cards put off.
QUIET_S = 0.001
#: Between two looks, but never less than the look before took: a look at thousands of sockets takes milliseconds.
POLL_S = 0.001
#: How long handshakes are waited for after the divert, and so how far away a client may be whose handshake is saved.
#: All others wait meanwhile: it is not done for a handshake that is older than the time after which a SYN is repeated
#: (RFC 6298: one second), and so may never be finished.
HANDSHAKE_S = 0.05
YOUNG_S = 1.0

_NAMED = 3

#: What is pending in the service's sockets: ``ServiceNetwork.pending``.
Look = Callable[[], Awaitable[list[SocketRecord]]]
#: Takes in what the destination has for these: ``HandBack.take``.
TakeIn = Callable[[Sequence[SocketRecord]], Awaitable[None]]
#: A listener, or both ends of a connection.
Key = tuple[str, int, str, int, int]


# --- pure ------------------------------------------------------------------------------------------------------------


def accept_queues(records: Iterable[SocketRecord]) -> dict[Key, int]:
    """How many connections wait to be accepted, by listener; of listeners that share a port (SO_REUSEPORT) by each."""
    return {_key(each): each.receive_queue_bytes for each in records if each.state == "LISTEN"}


def unfinished(records: Iterable[SocketRecord]) -> list[SocketRecord]:
    """Handshakes and closings: what needs its peer's packets to come to an end, and no process has."""
    return [each for each in records if each.state == "SYN_RECV" or _is_closing(each)]


def unread(records: Iterable[SocketRecord]) -> list[SocketRecord]:
    """The sockets from which the service has yet to read."""
    return [each for each in records if each.state != "LISTEN" and each.receive_queue_bytes]


def losses(records: Sequence[SocketRecord], given_up: Collection[Key] = ()) -> list[str]:
    """What of a service that is frozen with these sockets does not move, a sentence for each kind.

    ``given_up``: the closings that were not over when packets were diverted. Of one that came later only what was not
    even sent counts as lost: the rest was on its way, and it is the acknowledgement that goes elsewhere."""
    datagrams = [each for each in records if each.protocol == "udp" and each.receive_queue_bytes]
    handshakes = [each for each in records if each.state == "SYN_RECV"]
    closings = [(each, _lost_bytes(each, _key(each) in given_up)) for each in records if _is_closing(each)]
    cut = [(each, lost) for each, lost in closings if lost > 0]
    sentences = []
    if datagrams:
        memory = sum(each.receive_queue_bytes for each in datagrams)
        sentences.append(
            f"datagrams that the service had received and not read are lost ({memory} bytes of the kernel's memory): "
            + _named(datagrams)
        )
    if cut:
        sentences.append(
            f"{len(cut)} connection(s) that the service had closed are cut, with {sum(lost for _, lost in cut)} "
            f"byte(s) that their peers have not got: {_named([each for each, _ in cut])}"
        )
    if handshakes:
        sentences.append(
            f"{len(handshakes)} handshake(s) were not finished, and those clients have to connect again: "
            + _named(handshakes)
        )
    return sentences


def _is_closing(record: SocketRecord) -> bool:
    return record.state in ("FIN_WAIT1", "CLOSING", "LAST_ACK") and not record.inode


def _lost_bytes(record: SocketRecord, given_up: bool) -> int:
    """Not counting the FIN, which takes the last place in the queue."""
    return max(0, (record.send_queue_bytes if given_up else record.unsent_bytes) - 1)


def _key(record: SocketRecord) -> Key:
    return (record.local, record.local_port, record.remote, record.remote_port, record.inode)


def _named(records: Sequence[SocketRecord]) -> str:
    names = [_end(each.local, each.local_port) for each in records[:_NAMED]]
    for number, each in enumerate(records[:_NAMED]):
        if each.remote_port:
            names[number] += f" to {_end(each.remote, each.remote_port)}"
    return ", ".join(names) + (f" and {len(records) - _NAMED} more" if len(records) > _NAMED else "")


def _end(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _not_accepting(queues: dict[Key, int], bound_s: float) -> NotAccepting:
    where = ", ".join(sorted({_end(address, port) for address, port, *_ in queues}))
    waiting = f"{sum(queues.values())} connection(s) to {where} wait to be accepted"
    return NotAccepting(f"{waiting}, and within {bound_s:g} s the service did not take them")


# --- doing -----------------------------------------------------------------------------------------------------------


class Settling:
    """The waits of one source half, in the order of the methods. ``clock`` gives seconds."""

    def __init__(self, look: Look, take_in: TakeIn, bounds: Deadlines, clock: Callable[[], float]) -> None:
        self._look = look
        self._take_in = take_in
        self._bounds = bounds
        self._clock = clock
        self._looked_s = 0.0
        self._first_seen: dict[Key, float] = {}
        self._given_up: frozenset[Key] = frozenset()

    async def notice(self) -> None:
        """When copying begins: what is unfinished now has had its time when copying ends."""
        self._note(await self._records())

    async def before_divert(self) -> None:
        """Wait, while packets still reach us, until the service is seen to accept and what is unfinished is over.

        Raises NotAccepting: found out here, it costs clients nothing. The service may go on to write memory meanwhile,
        so only what there is now is waited for, and nothing longer than ``close_s`` since it was first seen."""
        await self._see_accepting()
        waited_for: set[Key] | None = None
        while True:
            now = self._note(await self._records())
            waited_for = now if waited_for is None else waited_for & now
            if all(self._clock() - self._first_seen[key] >= self._bounds.close_s for key in waited_for):
                break
            await self._pause()
        self._given_up = frozenset(now)

    async def after_divert(self) -> None:
        """Wait, when nothing new comes any more, until the service has taken what it had received: its connections
        (or raise NotAccepting after ``accept_s``), and everything else within ``settle_s``; and until what was not
        finished at the divert is, as long as that may be soon."""
        began = self._clock()
        await asyncio.sleep(min(QUIET_S, self._bounds.settle_s))
        while True:
            records = await self._records()
            self._note(records)
            waited_s = self._clock() - began
            queues = accept_queues(records)
            if queues and waited_s >= self._bounds.accept_s:
                raise _not_accepting(queues, self._bounds.accept_s)
            if not queues and waited_s >= self._patience_s(records):
                return
            if loose := unfinished(records):
                await self._take_in(loose)  # then another look: what it finishes may wait to be accepted
            await self._pause()

    async def losses(self) -> list[str]:
        """What of the frozen service does not move, a sentence for each kind."""
        return losses(await self._records(), self._given_up)

    def _patience_s(self, records: Sequence[SocketRecord]) -> float:
        """For how long after the divert these are waited for."""
        now = self._clock()
        loose = [(each, now - self._first_seen[_key(each)]) for each in unfinished(records)]
        if any(each.state == "SYN_RECV" and age_s < YOUNG_S for each, age_s in loose):
            return max(HANDSHAKE_S, self._bounds.settle_s)
        closing = any(_is_closing(each) and _key(each) not in self._given_up for each, _ in loose)
        return self._bounds.settle_s if closing or unread(records) else 0.0

    async def _see_accepting(self) -> None:
        """See each accept queue empty, or shorter than before: that of a busy service may never be empty."""
        began = self._clock()
        before: dict[Key, int] = {}
        accepting: set[Key] = set()
        while True:
            queues = accept_queues(await self._records())
            accepting |= {key for key, length in before.items() if queues.get(key, 0) < length}
            stuck = {key: length for key, length in queues.items() if key not in accepting}
            if not stuck:
                return
            if self._clock() - began >= self._bounds.accept_s:
                raise _not_accepting(stuck, self._bounds.accept_s)
            before = queues
            await self._pause()

    async def _records(self) -> list[SocketRecord]:
        began = self._clock()
        records = await self._look()
        self._looked_s = self._clock() - began
        return records

    async def _pause(self) -> None:
        await asyncio.sleep(max(POLL_S, self._looked_s))

    def _note(self, records: list[SocketRecord]) -> set[Key]:
        """Remember since when each of the unfinished is known; returns them all."""
        keys = {_key(each) for each in unfinished(records)}
        self._first_seen = {key: self._first_seen.get(key, self._clock()) for key in keys}
        return keys
