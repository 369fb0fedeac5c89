"""The mover for hosts behind a router: a host route for the address, changed on the router over SSH.

The end on the source makes every change (see `base`), with the source's own `ssh` and key: nothing hangs on a session
of somebody else's. The router runs Linux with iproute2; for others there is the hook. All addresses are changed by one
command. Exactly one route is expected, as `ip route add ADDRESS/32 via NEXT-HOP` makes it: `replace` finds a route by
destination and metric (ip-route(8)), and would put a second one beside one that has a metric of its own.
"""

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from .base import Commands, MoverFailedError, MovingAddress, Ran, Role

_SSH_FAILED = 255
_CONNECT_S = 3
_ROUTE = re.compile(r"\S+ via (?P<via>\S+) dev \S+(?: proto \S+)?(?: metric 1024)?(?: onlink)?(?: pref medium)?")
"""What iproute2 prints of such a route. IPv6 routes have the metric 1024 unless told otherwise (net/ipv6/route.c)."""


@dataclass(frozen=True, slots=True)
class Router:
    """How a host reaches the router. `key` and `known_hosts` are files on the host, or empty for ssh's own."""

    address: str
    user: str = "root"
    port: int = 22
    key: str = ""
    known_hosts: str = ""

    def ssh(self, command: str) -> list[str]:
        """The command that runs `command` on the router; it never asks, and never learns a host key."""
        options = ["BatchMode=yes", f"ConnectTimeout={_CONNECT_S}", "StrictHostKeyChecking=yes"]
        if self.key:
            options += [f"IdentityFile={self.key}", "IdentitiesOnly=yes"]
        if self.known_hosts:
            options += [f"UserKnownHostsFile={self.known_hosts}"]
        flags = [word for option in options for word in ("-o", option)]
        return ["ssh", *flags, "-p", str(self.port), "-l", self.user, self.address, command]


class RouteMover:
    """See the module, and `AddressMover`. `deadline_s` bounds each verb, in seconds."""

    def __init__(
        self, role: Role, router: Router, addresses: Sequence[MovingAddress], run: Commands, *, deadline_s: float
    ) -> None:
        self._role = role
        self._router = router
        self._addresses = addresses
        self._run = run
        self._deadline_s = deadline_s

    async def divert(self) -> None:
        """See `AddressMover`."""
        await self._point({each.address: each.to_next_hop for each in self._addresses})

    async def back(self) -> None:
        """See `AddressMover`."""
        await self._point({each.address: each.from_next_hop for each in self._addresses})

    async def released(self, peers: Collection[str]) -> tuple[str, ...]:
        """See `AddressMover`. The source looks at what the router says now."""
        if self._role == "destination":
            return ()
        routes = await self.routes()
        wanted = {each.address: each.to_next_hop for each in self._addresses}
        return tuple(
            f"the router {self._router.address} has {routes[address] or 'no route'} for {address}, not {hop}"
            for address, hop in wanted.items()
            if routes[address] != hop
        )

    async def hush(self) -> None:
        """See `AddressMover`."""

    async def finished(self) -> None:
        """See `AddressMover`."""

    async def close(self) -> None:
        """See `AddressMover`."""

    async def routes(self) -> dict[str, str]:
        """The next hop of the router's host route for each address; empty without one; in the router's words where it
        is not a plain one. Raises MoverFailedError."""
        found = {}
        for each in self._addresses:
            ran = await self._ssh(f"ip -{_version(each.address)} route show exact {_host(each.address)}")
            match = _ROUTE.fullmatch(ran.said.strip())
            found[each.address] = match["via"] if match else ran.said.strip()
        return found

    async def _point(self, next_hops: Mapping[str, str]) -> None:
        if self._role == "source":
            commands = [
                f"ip -{_version(address)} route replace {_host(address)} via {shlex.quote(next_hop)}"
                for address, next_hop in next_hops.items()
            ]
            await self._ssh(" && ".join(commands))

    async def _ssh(self, command: str) -> Ran:
        argv = self._router.ssh(command)
        ran = await self._run(argv, {}, self._deadline_s)
        if ran.status:
            what = "cannot be reached" if ran.status == _SSH_FAILED else f"refused: exit status {ran.status}"
            raise MoverFailedError(
                f"the router {self._router.address} {what}: {ran.said}", hint=f"try: {shlex.join(argv)}"
            )
        return ran


def _version(address: str) -> int:
    return 6 if ":" in address else 4


def _host(address: str) -> str:
    return f"{address}/{128 if ':' in address else 32}"
