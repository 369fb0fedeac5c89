"""The protocol of an address mover, and what every mover is told of a move.

A mover has two ends, one on each host, and each does its part of every verb. The end on the destination goes first: it
holds what arrives, and on the way back it lets go before the source draws packets again. What is changed in *one* place
(a route on a router) is changed by the end on the source, which alone knows until the commit where the service runs:
so two hosts never write to it at once, and the journal that tells where the service runs tells what is to be undone.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

from ..errors import NetfixError

Role = Literal["source", "destination"]


class MoverFailedError(NetfixError):
    """A hook or a router would not do what it was asked to; the message has its own words."""

    code: ClassVar[str] = "netfix.mover-failed"
    default_hint: ClassVar[str] = "run the command by hand on that host, as root"


@dataclass(frozen=True, slots=True)
class MovingAddress:
    """An address that moves, and the addresses of its family by which a router reaches the two hosts (may be empty)."""

    address: str
    prefixlen: int
    from_next_hop: str = ""
    to_next_hop: str = ""


class Ran(NamedTuple):
    """A command that has ended: its exit status, and what it printed; of one that failed, the line that explains it."""

    status: int
    said: str


class Commands(Protocol):
    """How a mover runs a command on its host, handed in: netfix itself starts no process."""

    async def __call__(self, argv: Sequence[str], environment: Mapping[str, str], deadline_s: float) -> Ran:
        """Run it to its end, without input. Raises MoverFailedError if it cannot be started or takes longer; then it
        and what it started is killed."""


class AddressMover(Protocol):
    """One end of the way by which service addresses get from the source of a move to its destination."""

    async def divert(self) -> None:
        """The packets go to the destination from here on. Undo: `back`, also if it failed. Raises NetfixError."""

    async def back(self) -> None:
        """The packets go to the source again. May be repeated, and called without `divert`. Raises NetfixError."""

    async def released(self, peers: Collection[str]) -> tuple[str, ...]:
        """The move is over, and the address stays at the destination. Returns what an operator should know.

        `peers` are addresses with which the service has connections. May be repeated. Raises NetfixError."""

    async def hush(self) -> None:
        """Do nothing more in the background: this host is about to answer for the addresses no more. Idempotent."""

    async def finished(self) -> None:
        """Return when what a verb has left to do in the background is done. A failure there is none."""

    async def close(self) -> None:
        """Let go of sockets, after `hush`; idempotent."""
