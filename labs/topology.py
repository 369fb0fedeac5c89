"""Who is on the segment: names and addresses. Plain data, no I/O.

All addresses are documentation addresses (RFC 5737, RFC 3849); they exist in the lab's own network namespaces
only. Services are given 192.0.2.200 to .250 and 2001:db8::200 to ::250 by whoever starts them.
"""

from __future__ import annotations

from dataclasses import dataclass

PREFIX = 24
PREFIX6 = 64
INTERFACE = "eth0"
SSH_PORT = 22


@dataclass(frozen=True)
class Station:
    """One machine on the segment. Its number is the last part of all its addresses."""

    name: str
    number: int
    # Hosts count their processes from different starts, as hosts that have been up for a while do: the pid of a
    # service is then free on the host it moves to. None: not a host, only a network namespace.
    first_pid: int | None = None

    @property
    def address(self) -> str:
        return f"192.0.2.{self.number}"

    @property
    def address6(self) -> str:
        return f"2001:db8::{self.number}"

    @property
    def mac(self) -> str:
        return f"02:00:5e:00:53:{self.number:02x}"

    @property
    def is_host(self) -> bool:
        return self.first_pid is not None


STATIONS = (
    Station("operator", 2),
    Station("alpha", 11, first_pid=2_000),
    Station("beta", 12, first_pid=12_000),
    Station("gamma", 13, first_pid=22_000),
    Station("clients", 100),
)
HOSTS = tuple(station for station in STATIONS if station.is_host)


def hosts_file() -> str:
    """What /etc/hosts says on every host."""
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost"]
    for station in STATIONS:
        lines += [f"{station.address} {station.name}", f"{station.address6} {station.name}"]
    return "\n".join(lines) + "\n"
