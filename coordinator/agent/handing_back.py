"""What belongs to the source and came to the destination: the last packets of handshakes and of closings.

After the divert a peer's packets come to the destination, also those that would finish a connection which no process on
the source has yet, or any more, and which is not dumped: the source would never hear of them, and when they are let go,
no socket would know them. So the source asks what is held of these connections, and takes in copies: without their
data, which stays in the hold for the socket that is restored.
"""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.agent.channel import Channel, expect, peer_aborted
from coordinator.agent.messages import FrozenNow, GiveUp, Kept, Unfinished
from coordinator.agent.network import ServiceNetwork, socket_facts
from coordinator.errors import ProtocolError
from netfix.sockets import SocketRecord

#: More are not asked for at a time: in a flood of half-open connections no answer helps.
MOST = 1024


class HandBack:
    """The source's part, for one migration."""

    def __init__(self, network: ServiceNetwork) -> None:
        self._network = network
        self._taken: set[bytes] = set()

    async def take(self, link: Channel, records: Sequence[SocketRecord]) -> None:
        """Ask what is held of these connections, and take in what was not taken in before: acknowledgements that are
        repeated would tell TCP of a loss (RFC 5681 section 3.2)."""
        sockets = socket_facts(records[:MOST])
        await link.send(Unfinished(sockets=sockets))
        packets = dict.fromkeys((await expect(link, Kept)).packets)
        await self._network.take_in([packet for packet in packets if packet not in self._taken], sockets)
        self._taken.update(packets)


async def answer_until_frozen(link: Channel, network: ServiceNetwork) -> None:
    """The destination's part: answers what the source asks, until that is frozen. Raises PeerAborted, ProtocolError,
    ChannelFailed."""
    while True:
        message, _ = await link.receive()
        if isinstance(message, FrozenNow):
            return
        if isinstance(message, GiveUp):
            raise peer_aborted(message)
        if not isinstance(message, Unfinished):
            raise ProtocolError(f"the source sent {type(message).__name__} where FrozenNow was due")
        await link.send(Kept(packets=tuple(await network.kept(message.sockets))))
