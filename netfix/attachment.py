"""How a network namespace is attached to its host's segment: described on one host, made again on another.

One interface beside loopback: a veth whose other end is a port of a bridge of the host, or a macvlan on one of its
interfaces. What is described is what peers and the restored sockets can tell: name, MAC, MTU, addresses, routes of the
main table, and the sysctls under net.ipv4.conf and net.ipv6.conf.

An interface with the MAC of another must not send a frame before the other has fallen silent: every switch on the way
would send it the other's packets. `add` makes it down, and without addresses; `raise_up` belongs behind a gate that
is `alone` (see `gate`).
"""

import errno
import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from .errors import NetfixError, from_errno
from .namespace import NoSuchNamespaceError, entered
from .netlink import (
    NETLINK_ROUTE,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NetlinkSocket,
    Refusal,
    encode,
)

_NEWLINK, _DELLINK, _GETLINK, _NEWADDR, _GETADDR, _NEWROUTE, _GETROUTE = 16, 17, 18, 20, 22, 24, 26
_IFF_UP = 0x1
_IFA_F_NODAD = 0x02
_MAIN_TABLE, _UNICAST, _BY_KERNEL, _BY_ADVERTISEMENT = 254, 1, 2, 9
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_SCOPES = ("all", "default")
_CONF = ("net/ipv4/conf", "net/ipv6/conf")


class AttachmentError(NetfixError):
    """A namespace is attached in a way that cannot be described, or that the other host cannot offer."""

    code = "netfix.attachment"
    default_hint = "give it one interface: a veth with its other end in a bridge, or a macvlan"


@dataclass(frozen=True, slots=True)
class Route:
    """A route of the main table that no address brought. `destination` in CIDR form; the others may be empty."""

    destination: str
    gateway: str
    source: str
    priority: int
    scope: int
    protocol: int


@dataclass(frozen=True, slots=True)
class Attachment:
    """See the module. `kind`: `veth` or `macvlan`; `parent`: the bridge, or the interface below; `host_end`: the veth's
    other end; `mode`: macvlan's. `addresses` in CIDR form, without link-local ones; `sysctls` by path below /proc/sys.
    """

    interface: str
    kind: str
    parent: str
    host_end: str
    mode: str
    mac: str
    mtu: int
    addresses: tuple[str, ...]
    routes: tuple[Route, ...]
    sysctls: dict[str, str]


def describe(namespace: Path) -> Attachment:
    """How it is attached to the host that this thread is on. Raises AttachmentError, NoSuchNamespaceError."""
    with NetlinkSocket(NETLINK_ROUTE, "interfaces") as netlink:
        outside = {int(link["index"]): link for link in _links(netlink)}
    with entered(namespace), NetlinkSocket(NETLINK_ROUTE, "interfaces") as netlink:
        links = [link for link in _links(netlink) if _name(link) != "lo" and link["flags"] & _IFF_UP]
        if len(links) != 1:
            named = ", ".join(_name(link) for link in links) or "none"
            raise AttachmentError(f"{namespace} must have one interface beside loopback that is up, and has: {named}")
        (link,) = links
        index = int(link["index"])
        addresses = _addresses(netlink, index)
        routes = tuple(_routes(netlink, index))
        sysctls = _read_sysctls(_name(link))
    kind = _kind(link)
    below = outside.get(int(link.get_attr("IFLA_LINK") or 0))
    host_end = ""
    if kind == "veth" and below is not None and _kind(below) == "veth" and below.get_attr("IFLA_LINK") == index:
        host_end = _name(below)
        below = outside.get(int(below.get_attr("IFLA_MASTER") or 0))
    if kind not in ("veth", "macvlan") or below is None:
        raise AttachmentError(
            f"{_name(link)} in {namespace} is no veth into a bridge of this host and no macvlan on it"
        )
    return Attachment(
        interface=_name(link),
        kind=kind,
        parent=_name(below),
        host_end=host_end,
        mode=_macvlan_mode(link) if kind == "macvlan" else "",
        mac=str(link.get_attr("IFLA_ADDRESS")),
        mtu=int(link.get_attr("IFLA_MTU")),
        addresses=addresses,
        routes=routes,
        sysctls=sysctls,
    )


def add(namespace: Path, wanted: Attachment) -> None:
    """Make the interface, down and without addresses. Undo: `delete`. Raises AttachmentError, NetfixError."""
    with NetlinkSocket(NETLINK_ROUTE, f"interface {wanted.interface}") as netlink:
        names = {_name(link): int(link["index"]) for link in _links(netlink)}
        if wanted.parent not in names:
            raise AttachmentError(f"this host has no {wanted.parent}", hint=f"make the interface {wanted.parent}")
        parent = names[wanted.parent]
        descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            inner: list[tuple[str, Any]] = [
                ("IFLA_IFNAME", wanted.interface),
                ("IFLA_ADDRESS", wanted.mac),
                ("IFLA_MTU", wanted.mtu),
                ("IFLA_NET_NS_FD", descriptor),
            ]
            message = ifinfmsg()
            if wanted.kind == "veth":
                host_end = wanted.host_end if wanted.host_end not in names else "veth%d"
                message["flags"] = message["change"] = _IFF_UP
                outer: list[tuple[str, Any]] = [
                    ("IFLA_IFNAME", host_end),
                    ("IFLA_MTU", wanted.mtu),
                    ("IFLA_MASTER", parent),
                ]
                data: dict[str, Any] = {"attrs": [("VETH_INFO_PEER", {"attrs": inner})]}
            else:
                outer = [("IFLA_LINK", parent), *inner]
                data = {"attrs": [("IFLA_MACVLAN_MODE", wanted.mode)]}
            info = {"attrs": [("IFLA_INFO_KIND", wanted.kind), ("IFLA_INFO_DATA", data)]}
            message["attrs"] = [*outer, ("IFLA_LINKINFO", info)]
            _ask(netlink, message, _NEWLINK, NLM_F_CREATE | NLM_F_EXCL, f"making {wanted.interface}")
        finally:
            os.close(descriptor)


def raise_up(namespace: Path, wanted: Attachment) -> None:
    """Sysctls, up, addresses, routes. Undo: `delete`. Raises NetfixError."""
    with entered(namespace), NetlinkSocket(NETLINK_ROUTE, f"interface {wanted.interface}") as netlink:
        _write_sysctls(wanted.sysctls)
        index = next(int(link["index"]) for link in _links(netlink) if _name(link) == wanted.interface)
        up = ifinfmsg()
        up["index"] = index
        up["flags"] = up["change"] = _IFF_UP
        _ask(netlink, up, _NEWLINK, 0, f"bringing up {wanted.interface}")
        for text in wanted.addresses:
            _ask(netlink, _address_message(text, index), _NEWADDR, NLM_F_CREATE, f"adding {text}")
        for route in wanted.routes:
            _ask(
                netlink, _route_message(route, index), _NEWROUTE, NLM_F_CREATE, f"adding a route to {route.destination}"
            )


def delete(namespace: Path, interface: str) -> None:
    """Take the interface away, and with it its other end, its addresses and routes. Idempotent."""
    try:
        with entered(namespace), NetlinkSocket(NETLINK_ROUTE, f"interface {interface}") as netlink:
            message = ifinfmsg()
            message["attrs"] = [("IFLA_IFNAME", interface)]
            netlink.request(encode(message, _DELLINK, NLM_F_ACK))
    except NoSuchNamespaceError:
        return
    except Refusal as refusal:
        if refusal.number != errno.ENODEV:
            raise from_errno(refusal.number, f"removing {interface}", refusal.detail) from refusal


# --- messages --------------------------------------------------------------------------------------------------------


def _ask(netlink: NetlinkSocket, message: Any, kind: int, flags: int, doing: str) -> None:
    try:
        netlink.request(encode(message, kind, flags | NLM_F_ACK))
    except Refusal as refusal:
        raise from_errno(refusal.number, doing, refusal.detail) from refusal


def _dump(netlink: NetlinkSocket, message: Any, kind: int) -> list[Any]:
    found = []
    try:
        answers = netlink.request(encode(message, kind, NLM_F_DUMP))
    except Refusal as refusal:
        raise from_errno(refusal.number, "reading interfaces", refusal.detail) from refusal
    for answer in answers:
        decoded = type(message)(answer.data)
        decoded.decode()
        found.append(decoded)
    return found


def _links(netlink: NetlinkSocket) -> list[Any]:
    return _dump(netlink, ifinfmsg(), _GETLINK)


def _name(link: Any) -> str:
    return str(link.get_attr("IFLA_IFNAME"))


def _kind(link: Any) -> str:
    info = link.get_attr("IFLA_LINKINFO")
    return str(info.get_attr("IFLA_INFO_KIND")) if info is not None else ""


def _macvlan_mode(link: Any) -> str:
    return str(link.get_attr("IFLA_LINKINFO").get_attr("IFLA_INFO_DATA").get_attr("IFLA_MACVLAN_MODE"))


def _addresses(netlink: NetlinkSocket, index: int) -> tuple[str, ...]:
    found = []
    for message in _dump(netlink, ifaddrmsg(), _GETADDR):
        address = ipaddress.ip_address(message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS"))
        if int(message["index"]) == index and not address.is_link_local:
            found.append(f"{address}/{message['prefixlen']}")
    return tuple(found)


def _routes(netlink: NetlinkSocket, index: int) -> list[Route]:
    found = []
    for message in [
        each for family in _FAMILIES.values() for each in _dump(netlink, _route_question(family), _GETROUTE)
    ]:
        table = message.get_attr("RTA_TABLE") or message["table"]
        ours = message.get_attr("RTA_OIF") == index and (table, message["type"]) == (_MAIN_TABLE, _UNICAST)
        if not ours or message["proto"] in (_BY_KERNEL, _BY_ADVERTISEMENT):
            continue
        everything = "0.0.0.0" if message["family"] == socket.AF_INET else "::"
        found.append(
            Route(
                destination=f"{message.get_attr('RTA_DST') or everything}/{message['dst_len']}",
                gateway=str(message.get_attr("RTA_GATEWAY") or ""),
                source=str(message.get_attr("RTA_PREFSRC") or ""),
                priority=int(message.get_attr("RTA_PRIORITY") or 0),
                scope=int(message["scope"]),
                protocol=int(message["proto"]),
            )
        )
    return sorted(found, key=lambda route: bool(route.gateway))  # what a gateway is reached by comes first


def _route_question(family: int) -> Any:
    message = rtmsg()
    message["family"] = family
    return message


def _address_message(text: str, index: int) -> Any:
    parsed = ipaddress.ip_interface(text)
    message = ifaddrmsg()
    message["family"] = _FAMILIES[parsed.version]
    message["prefixlen"] = parsed.network.prefixlen
    message["index"] = index
    message["attrs"] = [("IFA_LOCAL", str(parsed.ip)), ("IFA_ADDRESS", str(parsed.ip))]
    if parsed.version == 6:
        message["attrs"].append(("IFA_FLAGS", _IFA_F_NODAD))
    return message


def _route_message(route: Route, index: int) -> Any:
    network = ipaddress.ip_network(route.destination, strict=False)
    message = rtmsg()
    values = {
        "family": _FAMILIES[network.version],
        "dst_len": network.prefixlen,
        "table": _MAIN_TABLE,
        "proto": route.protocol,
        "scope": route.scope,
        "type": _UNICAST,
    }
    for name, value in values.items():
        message[name] = value
    attrs = [("RTA_OIF", index), ("RTA_GATEWAY", route.gateway), ("RTA_PREFSRC", route.source)]
    attrs += [("RTA_PRIORITY", route.priority), ("RTA_DST", str(network.network_address) if network.prefixlen else "")]
    message["attrs"] = [(name, value) for name, value in attrs if value]
    return message


# --- sysctls ---------------------------------------------------------------------------------------------------------


def _read_sysctls(interface: str, root: Path = Path("/proc/sys")) -> dict[str, str]:
    found = {}
    for folder in _CONF:
        for scope in (*_SCOPES, interface):
            for file in sorted((root / folder / scope).glob("*")):
                value = _value(file)
                if value is not None:
                    found[str(file.relative_to(root))] = value
    return found


def _value(file: Path) -> str | None:
    """None for a directory, what cannot be read (stable_secret before it is set), and what cannot be written."""
    try:
        return file.read_text().strip() if file.stat().st_mode & 0o200 else None
    except OSError:
        return None


def _write_sysctls(wanted: dict[str, str], root: Path = Path("/proc/sys")) -> None:
    """Those that are different here. What this kernel does not know, or not so, stays as it is."""
    for name, value in wanted.items():
        file = root / name
        if (here := _value(file)) is not None and here != value:
            try:
                file.write_text(value)
            except OSError:
                continue
