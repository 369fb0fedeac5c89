"""The source's part in moving tracked connections: which entries the destination needs, and when it gets them.

Those of the connections that are there go over before the divert, while the service runs, and are acknowledged: the
destination needs some 40 µs for each. What came or changed since then follows while CRIU dumps, which takes longer than
reading the table does, and at that time nothing can change any more: the gate is closed. In both cases they are there
before the first packet passes the destination's firewall.
"""

from __future__ import annotations

from coordinator.agent.channel import Channel, expect
from coordinator.agent.messages import ConnectionsTracked, TrackedConnections
from coordinator.agent.network import ServiceNetwork
from netfix.conntrack_entry import Connection
from netfix.ctnetlink import to_bytes

_PER_MESSAGE = 4096


class TrackedSource:
    """Sends the entries of one move. ``wanted``: whether the destination tracks connections; else nothing is done."""

    def __init__(self, network: ServiceNetwork, *, wanted: bool) -> None:
        self._network = network
        self._wanted = wanted
        self._sent: set[object] = set()

    async def send_all(self, link: Channel) -> None:
        """Before the divert: return when the destination has made them all."""
        if await self._send_new(link, acknowledge=True):
            await expect(link, ConnectionsTracked)

    async def send_rest(self, link: Channel) -> None:
        """Behind the closed gate."""
        await self._send_new(link, acknowledge=False)

    async def _send_new(self, link: Channel, *, acknowledge: bool) -> int:
        found = await self._network.tracked_connections() if self._wanted else []
        new = [each for each in found if _version(each) not in self._sent]
        for start in range(0, len(new), _PER_MESSAGE):
            batch = new[start : start + _PER_MESSAGE]
            last = start + _PER_MESSAGE >= len(new)
            await link.send(TrackedConnections(acknowledge=acknowledge and last), to_bytes(batch))
        self._sent.update(map(_version, new))
        return len(new)


def _version(connection: Connection) -> object:
    """What of an entry has to be sent again if it changes; that its timeout counts down is none of it."""
    return connection.key, connection.reply, connection.status, connection.tcp and connection.tcp.state
