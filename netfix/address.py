"""Addresses and interfaces of this host.

The service address is added beside the host's own. The kernel tells nobody when an address is added: for IPv4 it
sends a gratuitous ARP only where the sysctl `net.ipv4.conf.*.arp_notify` is set, and then when the interface comes up
or changes its MAC; for IPv6 it would send the solicitations of duplicate address detection, which `nodad` leaves out,
and an unsolicited advertisement only where `ndisc_notify` is set (kernel Documentation/networking/ip-sysctl.rst).
What the segment learns is what `announce` sends. But an address that is there is *answered for*: close the gate
(`gate.CLOSED`) before `add`.
"""

import errno
import ipaddress
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from .errors import (
    AddressConflictError,
    DependentAddressError,
    InvalidAddressError,
    NoSuchInterfaceError,
    from_errno,
)
from .netlink import (
    NETLINK_ROUTE,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NetlinkSocket,
    Refusal,
    attributes,
    encode,
)
from .unicast import parse_address

_RTM_NEWLINK, _RTM_GETLINK = 16, 18
_RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR = 20, 21, 22
_IFA_F_SECONDARY = 0x01  # for IPv6 the same bit says "temporary"
_IFA_F_NODAD = 0x02
_IFA_F_DEPRECATED = 0x20
_IFF_UP = 0x1
_IFF_LOWER_UP = 0x10000
_IFLA_IFNAME = 3
_IFINFOMSG_BYTES = 16
_FOREVER = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class AddressRecord:
    """An address on an interface.

    `secondary`: IPv4 only; another address of the same subnet came first, and the kernel takes this one away with it.
    `deprecated`: the kernel does not choose it as a source by itself (IPv6 with preferred_lft 0).
    """

    address: str
    prefixlen: int
    interface: str
    secondary: bool = field(default=False, compare=False)
    deprecated: bool = field(default=False, compare=False)

    @property
    def family(self) -> str:
        """`ipv4` or `ipv6`."""
        return "ipv6" if ":" in self.address else "ipv4"


@dataclass(frozen=True, slots=True)
class InterfaceRecord:
    """A network interface: `up` says that it is up and has a carrier; `mtu` in bytes; `mac` as aa:bb:cc:dd:ee:ff."""

    name: str
    index: int
    mac: str
    up: bool
    mtu: int


@dataclass(frozen=True, slots=True)
class ServiceAddress:
    """An address that moves with a service, with the prefix length it has on the segment."""

    address: str
    prefixlen: int

    @classmethod
    def parse(cls, text: str) -> "ServiceAddress":
        """Read `192.0.2.10/24` or `2001:db8::10/64`, strictly: prefix length and a host address are wanted.

        Raises InvalidAddressError.
        """
        address, slash, prefix = text.partition("/")
        parsed = parse_address(address)
        if not slash:
            raise InvalidAddressError(f"{text!r} has no prefix length", hint=f"write e.g. {parsed}/24")
        if not (prefix.isascii() and prefix.isdigit()) or not 1 <= int(prefix) <= parsed.max_prefixlen:
            raise InvalidAddressError(f"{text!r}: the prefix length must be a number from 1 to {parsed.max_prefixlen}")
        network = ipaddress.ip_network((parsed, int(prefix)), strict=False)
        if network.prefixlen < parsed.max_prefixlen - 1 and parsed in (
            network.network_address,
            network.broadcast_address if parsed.version == 4 else network.network_address,
        ):
            raise InvalidAddressError(f"{text!r} is the address of the network itself, not of a host in it")
        return cls(str(parsed), int(prefix))

    def on(self, interface: str) -> AddressRecord:
        """This address on an interface."""
        return AddressRecord(self.address, self.prefixlen, interface)

    def __str__(self) -> str:
        return f"{self.address}/{self.prefixlen}"


def dependents(record: AddressRecord, records: Iterable[AddressRecord]) -> list[AddressRecord]:
    """The addresses that the kernel would remove with `record`: IPv4 secondaries of its subnet. Pure.

    Unless `promote_secondaries` is set on the interface (kernel Documentation/networking/ip-sysctl.rst).
    """
    if record.family != "ipv4" or record.secondary:
        return []
    subnet = ipaddress.ip_interface(f"{record.address}/{record.prefixlen}").network
    return [
        other
        for other in records
        if other.interface == record.interface
        and other.secondary
        and other.family == "ipv4"
        and ipaddress.ip_interface(f"{other.address}/{other.prefixlen}").network == subnet
    ]


def _check_addable(record: AddressRecord, present: Sequence[AddressRecord]) -> bool:
    """Is there anything to add? Raises AddressConflictError."""
    for other in present:
        if other == record:
            return False
        raise AddressConflictError(
            f"{record.address}/{record.prefixlen} cannot be added to {record.interface}: "
            f"the host has {other.address}/{other.prefixlen} on {other.interface}"
        )
    return True


def _check_removable(record: AddressRecord, on_interface: Sequence[AddressRecord], promote: bool) -> bool:
    """Is it there? Raises DependentAddressError."""
    present = next((other for other in on_interface if other == record), None)
    if present is None:
        return False
    taken_along = dependents(present, on_interface)
    if taken_along and not promote:
        raise DependentAddressError(
            f"removing {record.address} from {record.interface} would remove "
            f"{', '.join(other.address for other in taken_along)} with it",
            hint=f"sysctl -w net.ipv4.conf.{record.interface}.promote_secondaries=1",
        )
    return True


class AddressBook(Protocol):
    """The addresses and interfaces of one host."""

    async def find(self, address: str) -> list[AddressRecord]:
        """Where the address is: on no interface, on one, or on several. Raises InvalidAddressError."""

    async def add(self, record: AddressRecord) -> None:
        """Add it; the host answers for it from here on, unless a gate is in the way. Undo: `remove`.

        Nothing is sent. IPv6 goes without duplicate address detection, and is not chosen as a source. If the same
        record is there, that is fine. Raises AddressConflictError if the address is there otherwise,
        NoSuchInterfaceError.
        """

    async def remove(self, record: AddressRecord) -> None:
        """Remove it; idempotent. Undo: `add`, except for routes that named it as their preferred source.

        Raises DependentAddressError if the kernel would remove other addresses with it.
        """

    async def interface(self, name: str) -> InterfaceRecord:
        """The interface of that name. Raises NoSuchInterfaceError."""

    async def on_interface(self, name: str) -> list[AddressRecord]:
        """All addresses of one interface, in the kernel's order. Raises NoSuchInterfaceError."""

    def close(self) -> None:
        """Let go of the sockets; idempotent."""


class NetlinkAddressBook:
    """The addresses in the network namespace of the thread that makes it, over rtnetlink. See `AddressBook`."""

    def __init__(self, sysctl: Path = Path("/proc/sys")) -> None:
        self._netlink = NetlinkSocket(NETLINK_ROUTE, "addresses")
        self._sysctl = sysctl

    async def find(self, address: str) -> list[AddressRecord]:
        wanted = str(ipaddress.ip_address(parse_address(address)))
        return [record for record in self._records() if record.address == wanted]

    async def add(self, record: AddressRecord) -> None:
        interface = await self.interface(record.interface)
        if not _check_addable(record, await self.find(record.address)):
            return
        message = self._message(record, interface.index)
        if record.family == "ipv6":
            message["attrs"] += [
                ("IFA_FLAGS", _IFA_F_NODAD),
                ("IFA_CACHEINFO", {"ifa_preferred": 0, "ifa_valid": _FOREVER, "cstamp": 0, "tstamp": 0}),
            ]
        try:
            self._netlink.request(encode(message, _RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL))
        except Refusal as refusal:
            if refusal.number != errno.EEXIST:
                raise from_errno(refusal.number, _doing("adding", record), refusal.detail) from refusal

    async def remove(self, record: AddressRecord) -> None:
        try:
            interface = await self.interface(record.interface)
        except NoSuchInterfaceError:
            return  # and with the interface, its addresses
        if not _check_removable(record, await self.on_interface(record.interface), self._promotes(record.interface)):
            return
        try:
            self._netlink.request(encode(self._message(record, interface.index), _RTM_DELADDR, NLM_F_ACK))
        except Refusal as refusal:
            if refusal.number != errno.EADDRNOTAVAIL:
                raise from_errno(refusal.number, _doing("removing", record), refusal.detail) from refusal

    async def interface(self, name: str) -> InterfaceRecord:
        message = ifinfmsg()
        message["attrs"] = [("IFLA_IFNAME", name)]
        try:
            answers = self._netlink.request(encode(message, _RTM_GETLINK, NLM_F_ACK))
        except Refusal as refusal:
            if refusal.number in (errno.ENODEV, errno.ERANGE, errno.EINVAL):
                raise NoSuchInterfaceError(f"there is no interface {name!r} on this host") from refusal
            raise from_errno(refusal.number, f"interface {name}", refusal.detail) from refusal
        link = ifinfmsg(answers[0].data)
        link.decode()
        both = _IFF_UP | _IFF_LOWER_UP
        return InterfaceRecord(
            name=str(link.get_attr("IFLA_IFNAME")),
            index=int(link["index"]),
            mac=str(link.get_attr("IFLA_ADDRESS") or ""),
            up=link["flags"] & both == both,
            mtu=int(link.get_attr("IFLA_MTU")),
        )

    async def on_interface(self, name: str) -> list[AddressRecord]:
        await self.interface(name)
        return [record for record in self._records() if record.interface == name]

    def close(self) -> None:
        self._netlink.close()

    def _records(self) -> list[AddressRecord]:
        try:
            answers = self._netlink.request(encode(ifaddrmsg(), _RTM_GETADDR, NLM_F_DUMP))
            names = self._names()
        except Refusal as refusal:
            raise from_errno(refusal.number, "reading addresses", refusal.detail) from refusal
        records = []
        for answer in answers:
            message = ifaddrmsg(answer.data)
            message.decode()
            flags = int(message.get_attr("IFA_FLAGS") or message["flags"])
            # On a point-to-point interface IFA_ADDRESS is the other end; IPv6 has no IFA_LOCAL elsewhere.
            address = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
            ipv4 = message["family"] == socket.AF_INET
            records.append(
                AddressRecord(
                    address=str(ipaddress.ip_address(address)),
                    prefixlen=int(message["prefixlen"]),
                    interface=names.get(int(message["index"]), f"#{message['index']}"),
                    secondary=ipv4 and bool(flags & _IFA_F_SECONDARY),
                    deprecated=bool(flags & _IFA_F_DEPRECATED),
                )
            )
        return records

    def _names(self) -> dict[int, str]:
        """Interface names by index: asked on this socket, whose network namespace the addresses are of."""
        names = {}
        for answer in self._netlink.request(encode(ifinfmsg(), _RTM_GETLINK, NLM_F_DUMP)):
            (index,) = struct.unpack_from("=i", answer.payload, 4)
            for kind, value in attributes(answer.payload, _IFINFOMSG_BYTES):
                if kind == _IFLA_IFNAME:
                    names[index] = value.rstrip(b"\0").decode()
        return names

    def _promotes(self, interface: str) -> bool:
        directory = self._sysctl / "net/ipv4/conf"
        files = [directory / scope / "promote_secondaries" for scope in ("all", interface)]
        return any(file.exists() and file.read_text().strip() != "0" for file in files)

    @staticmethod
    def _message(record: AddressRecord, index: int) -> Any:
        message = ifaddrmsg()
        message["family"] = socket.AF_INET6 if record.family == "ipv6" else socket.AF_INET
        message["prefixlen"] = record.prefixlen
        message["index"] = index
        message["attrs"] = [("IFA_LOCAL", record.address), ("IFA_ADDRESS", record.address)]
        return message


def _doing(verb: str, record: AddressRecord) -> str:
    return f"{verb} {record.address}/{record.prefixlen} on {record.interface}"


class FakeAddressBook:
    """Addresses in memory, for tests. `records` is what the host has; `history` the changes, as ("add", record).

    `fail_next` is raised by the next change, which then does not happen.
    """

    def __init__(
        self, interfaces: Sequence[InterfaceRecord], records: Sequence[AddressRecord] = (), promote: bool = True
    ) -> None:
        self._interfaces = {interface.name: interface for interface in interfaces}
        self._promote = promote
        self.records = list(records)
        self.history: list[tuple[str, AddressRecord]] = []
        self.fail_next: Exception | None = None
        self.closed = False

    async def find(self, address: str) -> list[AddressRecord]:
        wanted = str(parse_address(address))
        return [record for record in self.records if record.address == wanted]

    async def add(self, record: AddressRecord) -> None:
        await self.interface(record.interface)
        self._fail()
        if _check_addable(record, await self.find(record.address)):
            secondary = record.family == "ipv4" and any(
                other.family == "ipv4"
                and other.interface == record.interface
                and ipaddress.ip_interface(f"{other.address}/{other.prefixlen}").network
                == ipaddress.ip_interface(f"{record.address}/{record.prefixlen}").network
                for other in self.records
            )
            self.records.append(
                AddressRecord(
                    record.address,
                    record.prefixlen,
                    record.interface,
                    secondary=secondary,
                    deprecated=record.family == "ipv6",
                )
            )
            self.history.append(("add", record))

    async def remove(self, record: AddressRecord) -> None:
        self._fail()
        on_interface = [other for other in self.records if other.interface == record.interface]
        if _check_removable(record, on_interface, self._promote):
            self.records.remove(record)
            self.history.append(("remove", record))

    async def interface(self, name: str) -> InterfaceRecord:
        if name not in self._interfaces:
            raise NoSuchInterfaceError(f"there is no interface {name!r} on this host")
        return self._interfaces[name]

    async def on_interface(self, name: str) -> list[AddressRecord]:
        await self.interface(name)
        return [record for record in self.records if record.interface == name]

    def close(self) -> None:
        self.closed = True

    def _fail(self) -> None:
        failure, self.fail_next = self.fail_next, None
        if failure is not None:
            raise failure
