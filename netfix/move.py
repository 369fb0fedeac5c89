"""Moves an address between two interfaces of this machine, which may be in two network namespaces.

The address alone: sockets stay where they are. It is taken away at one place before it is added at the other, so that
at no instant two answer for it; if it cannot be added, it is put back. Who moves a service with its connections between
hosts wants `livemove`.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .address import AddressBook, AddressRecord, NetlinkAddressBook
from .errors import AddressConflictError, NetfixError, NoSuchInterfaceError, UsageError, from_errno
from .frames import PacketFramePort, announce
from .unicast import parse_address

NETNS = Path("/run/netns")
"""Where `ip netns` keeps the names of namespaces (ip-netns(8))."""
_CLONE_NEWNET = 0x40000000
_LISTEN_S = 0.5

Frames = Callable[[str, str], tuple[bytes, ...]]
"""(address, mac) → frames: `announce.announcement_frames` and `announce.probe_frames`."""


@dataclass(frozen=True, slots=True)
class Place:
    """An interface, in the network namespace of that file, or, without one, in the caller's."""

    interface: str
    netns: Path | None = None

    @classmethod
    def parse(cls, text: str) -> "Place":
        """Read `eth0`, `eth0@NAME` (as `ip netns` has it) or `eth0@/path/of/a/namespace`. Raises UsageError."""
        interface, at, netns = text.partition("@")
        if not interface or (at and not netns):
            raise UsageError(f"{text!r} is no place", hint="write an interface, e.g. eth0, or eth0@NAMESPACE")
        return cls(interface, NETNS / netns if at else None)

    def __str__(self) -> str:
        return f"{self.interface}@{self.netns}" if self.netns else self.interface

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is in this place's namespace: sockets opened there belong to it for ever.

        Raises NotPermittedError, UsageError."""
        if self.netns is None:
            yield
            return
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            try:
                other = os.open(self.netns, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise UsageError(f"there is no network namespace {self.netns}", hint="list them: ip netns") from error
            try:
                _enter(other, f"entering {self.netns}")
            finally:
                os.close(other)
            try:
                yield
            finally:
                _enter(own, "returning to the own network namespace")
        finally:
            os.close(own)


def _enter(descriptor: int, doing: str) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
        raise from_errno(ctypes.get_errno(), doing)


@dataclass(frozen=True, slots=True)
class Moved:
    """`mac` is the one announced; `others` are the MACs that answer for the address as well: none, if all is well."""

    address: str
    prefixlen: int
    mac: str
    others: tuple[str, ...]


async def move(address: str, origin: Place, target: Place, announcement: Frames, probes: Frames) -> Moved:
    """Move it, announce it from its new place for a second, and ask the segment there who else has it.

    Raises NetfixError; the address is then where it was, but for a failure to announce, which says so.
    """
    with contextlib.ExitStack() as undo:
        with origin.entered():
            here = undo.enter_context(contextlib.closing(NetlinkAddressBook()))
        with target.entered():
            there = undo.enter_context(contextlib.closing(NetlinkAddressBook()))
            port = undo.enter_context(contextlib.closing(PacketFramePort(target.interface)))
        mac = (await there.interface(target.interface)).mac
        record = await find(here, address, origin)
        await transfer(record, here, there, target)
        try:
            await announce(port, announcement(record.address, mac))
            with target.entered():  # it listens on a socket of its own
                others = await port.who(probes(record.address, mac), record.address, _LISTEN_S)
        except NetfixError as error:
            error.message = f"{record.address} is on {target} now, and that could not be announced: {error}"
            raise
        return Moved(record.address, record.prefixlen, mac, tuple(sorted(others)))


async def find(book: AddressBook, address: str, origin: Place) -> AddressRecord:
    """The address at its origin. Raises AddressConflictError if it is not there, NoSuchInterfaceError."""
    wanted = str(parse_address(address))
    found = next((each for each in await book.on_interface(origin.interface) if each.address == wanted), None)
    if found is None:
        raise AddressConflictError(f"{wanted} is not on {origin}", hint="say with --from where it is: ip address show")
    return found


async def transfer(record: AddressRecord, here: AddressBook, there: AddressBook, target: Place) -> None:
    """Take it away here, add it there, or put it back. Raises NetfixError; AddressConflictError if it is there."""
    moved = AddressRecord(record.address, record.prefixlen, target.interface)
    await here.remove(record)
    try:
        await there.add(moved)
    except NetfixError:
        with contextlib.suppress(NoSuchInterfaceError):
            await here.add(record)
        raise
