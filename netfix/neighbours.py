"""Which neighbours packets to some peers go to first, as this host's routing tables say."""

import errno
import ipaddress
import socket
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from pyroute2.netlink.rtnl.rtmsg import rtmsg

from .errors import NetfixError, from_errno
from .namespace import Home
from .netlink import NETLINK_ROUTE, NLM_F_ACK, NetlinkSocket, Refusal, encode

MOST_PEERS = 256
"""So many peers are looked up, at some 20 µs each: many peers are behind few neighbours."""

_RTM_GETROUTE = 26
_NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES, errno.ENODEV)


class Neighbourhood(Protocol):
    """Which machines of a segment packets to some peers go to first."""

    async def towards(self, address: str, peers: Iterable[str]) -> tuple[str, ...]:
        """The neighbours on the interface by which packets from `address` reach `peers`: the peers themselves, or
        routers. Peers of the other family, or by another interface, or without a route, add none. Raises NetfixError.
        """

    def close(self) -> None:
        """Let go of the socket; idempotent."""


class RouteNeighbourhood:
    """What the routing tables say of one interface, in the network namespace of the thread that makes this. See
    `Neighbourhood`."""

    def __init__(self, interface: str) -> None:
        """Raises NotPermittedError."""
        self._interface = interface
        self._netlink = NetlinkSocket(NETLINK_ROUTE, "routes")
        self._home = Home()

    async def towards(self, address: str, peers: Iterable[str]) -> tuple[str, ...]:
        """See `Neighbourhood`. At most `MOST_PEERS` are looked up."""
        try:
            with self._home.entered():
                index = socket.if_nametoindex(self._interface)
        except OSError as error:
            raise from_errno(error.errno or errno.ENODEV, f"interface {self._interface}") from error
        wanted = [peer for peer in sorted(set(peers)) if (":" in peer) == (":" in address)]
        found = (self._next_hop(address, peer, index) for peer in wanted[:MOST_PEERS])
        return tuple(dict.fromkeys(hop for hop in found if hop))

    def close(self) -> None:
        """See `Neighbourhood`."""
        self._netlink.close()
        self._home.close()

    def _next_hop(self, address: str, peer: str, index: int) -> str:
        route = _route(self._netlink, [("RTA_DST", peer), ("RTA_SRC", address)])
        if route is None or route.get_attr("RTA_OIF") != index:
            return ""
        via = route.get_attr("RTA_VIA")
        gateway = route.get_attr("RTA_GATEWAY") or (via["addr"] if via else None)
        if gateway and (":" in gateway) != (":" in address):
            return ""  # IPv4 behind an IPv6 router: it cannot be asked from an IPv4 address
        return str(ipaddress.ip_address(gateway or peer))


def way_to(address: str) -> str:
    """The interface by which packets to an address leave the network namespace that we are in; empty without a route.
    Raises NetfixError."""
    with NetlinkSocket(NETLINK_ROUTE, "routes") as netlink:
        route = _route(netlink, [("RTA_DST", address)])
    return "" if route is None else socket.if_indextoname(route.get_attr("RTA_OIF"))


def _route(netlink: NetlinkSocket, wanted: list[tuple[str, str]]) -> Any | None:
    """What the routing tables say; the destination comes first."""
    peer = wanted[0][1]
    message = rtmsg()
    message["family"] = socket.AF_INET6 if ":" in peer else socket.AF_INET
    message["attrs"] = wanted
    try:
        answers = netlink.request(encode(message, _RTM_GETROUTE, NLM_F_ACK))
    except Refusal as refusal:
        if refusal.number in _NO_ROUTE:
            return None
        raise from_errno(refusal.number, f"route to {peer}", refusal.detail) from refusal
    route = rtmsg(answers[0].data)
    route.decode()
    return route


class FakeNeighbourhood:
    """Neighbours in memory, for tests: `hops` says which neighbour a peer is behind, else it is one itself."""

    def __init__(self, hops: Mapping[str, str] | None = None) -> None:
        self.hops = dict(hops or {})
        self.fail_next: NetfixError | None = None
        self.closed = False

    async def towards(self, address: str, peers: Iterable[str]) -> tuple[str, ...]:
        """See `Neighbourhood`."""
        failure, self.fail_next = self.fail_next, None
        if failure is not None:
            raise failure
        wanted = sorted({peer for peer in peers if (":" in peer) == (":" in address)})
        return tuple(dict.fromkeys(self.hops.get(peer, peer) for peer in wanted))

    def close(self) -> None:
        """See `Neighbourhood`."""
        self.closed = True
