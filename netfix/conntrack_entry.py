"""Entries of the kernel's table of tracked connections: what one is, and what it becomes on another host. Pure."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from .sockets import SocketRecord

TCP, UDP = 6, 17
SEEN_REPLY, ASSURED, CONFIRMED, SRC_NAT, DST_NAT, DYING = 0x2, 0x4, 0x8, 0x10, 0x20, 0x200
"""Bits of a status (include/uapi/linux/netfilter/nf_conntrack_common.h)."""
_KEPT_STATUS = SEEN_REPLY | ASSURED | CONFIRMED | SRC_NAT | DST_NAT

SYN_SENT, ESTABLISHED, FIN_WAIT, CLOSE_WAIT, LAST_ACK, TIME_WAIT, CLOSE = 1, 3, 4, 5, 6, 7, 8
TCP_STATES = (
    *("NONE", "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT", "LAST_ACK", "TIME_WAIT", "CLOSE"),
    "SYN_SENT2",
)
"""By number (include/uapi/linux/netfilter/nf_conntrack_tcp.h)."""
_OVER = (TIME_WAIT, CLOSE)

WINDOW_SCALE, SACK_PERMITTED, LIBERAL = 0x01, 0x02, 0x08
SETTABLE = 0x0F
"""The TCP flags that are facts of the connection; the others belong to the windows."""

LEAST_TIMEOUT_S = 120
"""No entry is made with less: it must outlive the freeze, and its next packet sets it as this host has it."""
_ESTABLISHED_S = 432_000
"""The kernel's default for TCP, where there is no entry to take it from (nf_conntrack_proto_tcp.c)."""


class Flow(NamedTuple):
    """One direction of a connection."""

    source: str
    source_port: int
    destination: str
    destination_port: int

    @property
    def reversed(self) -> "Flow":
        """The direction of the answers, where nothing is translated."""
        return Flow(self.destination, self.destination_port, self.source, self.source_port)


class TcpInfo(NamedTuple):
    """What the table knows of TCP: `state` is an index into `TCP_STATES`; scales and flags of both directions."""

    state: int
    scale_original: int = 0
    scale_reply: int = 0
    flags_original: int = 0
    flags_reply: int = 0


@dataclass(frozen=True, slots=True)
class Connection:
    """An entry of the table. `reply` is not `original` reversed where an address or a port is translated.

    `protocol`: 6 or 17. `status`: bits, see `SEEN_REPLY`. `tcp`: None for UDP.
    """

    protocol: int
    original: Flow
    reply: Flow
    status: int
    timeout_s: int
    mark: int = 0
    zone: int = 0
    tcp: TcpInfo | None = None

    @property
    def key(self) -> tuple[int, Flow, int]:
        """What no two entries of a table share."""
        return self.protocol, self.original, self.zone

    @property
    def addresses(self) -> frozenset[str]:
        """All that it names."""
        return frozenset((*self.original[::2], *self.reply[::2]))


def movable(connection: Connection) -> bool:
    """Is it worth moving? Not what is over: a late segment of it may as well be dropped."""
    over = connection.tcp is not None and connection.tcp.state in _OVER
    return not over and not connection.status & DYING


def as_created(connection: Connection) -> Connection:
    """What `create` makes of it: flags that hold on a host which has not seen the connection's beginning."""
    tcp = connection.tcp
    if tcp is not None:
        flags = (flags & SETTABLE | LIBERAL for flags in (tcp.flags_original, tcp.flags_reply))
        tcp = TcpInfo(tcp.state, tcp.scale_original, tcp.scale_reply, *flags)
    status = connection.status & _KEPT_STATUS | CONFIRMED
    return replace(connection, status=status, timeout_s=max(connection.timeout_s, LEAST_TIMEOUT_S), tcp=tcp)


_STATES_OF_SOCKETS = {
    "SYN_SENT": SYN_SENT,
    "ESTABLISHED": ESTABLISHED,
    "FIN_WAIT1": FIN_WAIT,
    "FIN_WAIT2": FIN_WAIT,
    "CLOSE_WAIT": CLOSE_WAIT,
    "LAST_ACK": LAST_ACK,
    "CLOSING": LAST_ACK,
}


def untracked(
    records: Iterable[SocketRecord], addresses: Collection[str], known: Iterable[Connection]
) -> list[Connection]:
    """Entries for the connected sockets on these addresses that `known` has none for, as a host that does not track
    would have them. A connection to a port that is listened on (UDP: that another socket is bound to) came from the
    peer."""
    everything = list(records)
    seen = {(each.protocol, flow) for each in known for flow in (each.original, each.reply)}
    bound = {(each.protocol, each.local_port) for each in everything if each.state in ("LISTEN", "UNCONNECTED")}
    found = []
    for record in everything:
        protocol = TCP if record.protocol == "tcp" else UDP
        outward = Flow(record.local, record.local_port, record.remote, record.remote_port)
        connected = record.state in _STATES_OF_SOCKETS if protocol == TCP else record.state == "ESTABLISHED"
        if not connected or record.local not in addresses or (protocol, outward) in seen:
            continue
        original = outward.reversed if (record.protocol, record.local_port) in bound else outward
        state = _STATES_OF_SOCKETS[record.state]
        answered = CONFIRMED if protocol == TCP and state == SYN_SENT else CONFIRMED | SEEN_REPLY | ASSURED
        timeout_s = _ESTABLISHED_S if protocol == TCP and state == ESTABLISHED else LEAST_TIMEOUT_S
        tcp = TcpInfo(state) if protocol == TCP else None
        found.append(Connection(protocol, original, original.reversed, answered, timeout_s, tcp=tcp))
    return found
