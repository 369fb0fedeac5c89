"""Stateful firewalls on both hosts: a moved connection is one that they know."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from labs.lab import Lab
from labs.machines import Host
from labs.topology import STATIONS
from labs.workloads import PORT
from tests.integration.command import migrate
from tests.integration.faults import until
from tests.integration.scene import CONNECTIONS, Scene, left_over

HOSTS = ("alpha", "beta")

#: Let in are new connections to the service and to SSH, what the agents open between them, and what is known.
STRICT = f"""
table inet strict {{
    counter refused {{ }}
    chain input {{
        type filter hook input priority 0; policy drop;
        iif lo accept
        icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
        ct state invalid counter name refused drop
        ct state established,related accept
        tcp dport {{ 22, {PORT} }} tcp flags & (syn | ack | rst) == syn ct state new accept
        ip saddr {{ 192.0.2.11, 192.0.2.12 }} tcp flags & (syn | ack | rst) == syn ct state new accept
        counter name refused
    }}
    chain output {{ type filter hook output priority 0; policy accept; ct state invalid counter name refused drop; }}
}}
"""


_FORGET = """
import asyncio, sys
from netfix.conntrack import NetlinkConnectionTable

async def main(addresses):
    table = NetlinkConnectionTable()
    known = await table.connections(addresses)
    await table.remove(addresses)
    print(len(known), flush=True)
    if sys.stdin.readline():
        await table.create(known)
        print("remembered", flush=True)

asyncio.run(main(sys.argv[1:]))
"""


class Forgotten:
    """The entries of some addresses, taken out of a host's table."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._line()

    def remember(self) -> None:
        """Put them back."""
        assert self._process.stdin is not None
        self._process.stdin.write("now\n")
        self._process.stdin.flush()
        self._line()

    def _line(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip()

    def close(self) -> None:
        """End the process that keeps them."""
        self._process.communicate(timeout=10)


def forgetting(host: Host, *addresses: str) -> Forgotten:
    """Take the entries that name these addresses out of a host's table."""
    command = ["nsenter", f"--net={host.netns_path}", sys.executable, "-c", _FORGET, *addresses]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return Forgotten(process)


@contextmanager
def firewalls(lab: Lab) -> Iterator[None]:
    """On alpha and beta. What is connected by then is known: their rules begin with the tracking of a moment before."""
    try:
        for name in HOSTS:
            lab.host(name).run(["sh", "-c", "echo 0 >/proc/sys/net/netfilter/nf_conntrack_tcp_loose"])
            lab.host(name).run(["nft", "-f", "-"], input=STRICT)
        yield
    finally:
        for name in HOSTS:
            lab.host(name).run(["sh", "-c", "nft delete table inet strict"], check=False)
            forgetting(lab.host(name), *(station.address for station in STATIONS)).close()


def refused(host: Host) -> int:
    said = json.loads(host.run(["nft", "-j", "list", "counter", "inet", "strict", "refused"]).stdout)
    return next(int(each["counter"]["packets"]) for each in said["nftables"] if "counter" in each)


def tracked(host: Host, address: str) -> list[str]:
    """The entries of established connections to the service."""
    lines = host.read_file("/proc/net/nf_conntrack").splitlines()
    return [line for line in lines if f"dst={address} " in line and "ESTABLISHED" in line]


@pytest.fixture
def scene(lab: Lab) -> Iterator[Scene]:
    with firewalls(lab):
        made = Scene.start(lab, "counter")
        try:
            yield made
        finally:
            made.close()


def at_rest(scene: Scene, host: str) -> None:
    """As `Scene.unharmed`, but for the firewalls, which stay."""
    scene.answers(5 * CONNECTIONS)
    seen = [clients.end_hop() for clients in scene.clients]
    assert [(each["lost"], each["resets"], each["wrong_bytes"]) for each in seen] == [(0, 0, 0)]
    assert scene.host == host
    left = [line for line in left_over(scene.lab, scene.workload, host) if not line.endswith("nft: table inet strict")]
    assert left == []


def test_connections_go_there_and_back_through_strict_firewalls(scene: Scene) -> None:
    (address,) = scene.workload.listens_on
    hosts = {name: scene.lab.host(name) for name in HOSTS}
    assert len(tracked(hosts["alpha"], address)) == CONNECTIONS
    for source, destination in (("alpha", "beta"), ("beta", "alpha"), ("alpha", "beta")):
        before = {name: refused(host) for name, host in hosts.items()}
        scene.begin_hop()
        said = migrate(scene.lab, "counter", destination)
        assert said.status == 0, said.stderr
        at_rest(scene, destination)
        assert len(tracked(hosts[destination], address)) == CONNECTIONS
        assert tracked(hosts[source], address) == []
        assert {name: refused(host) for name, host in hosts.items()} == before


def test_without_its_entries_a_firewall_cuts_every_connection(scene: Scene) -> None:
    """What the test above would show if entries did not move."""
    (address,) = scene.workload.listens_on
    beta = scene.lab.host("beta")
    scene.begin_hop()
    assert migrate(scene.lab, "counter", "beta").status == 0
    before = refused(beta)
    with closing(forgetting(beta, address)) as forgotten:
        until(lambda: refused(beta) >= before + CONNECTIONS, "every connection's segments are refused")
        assert tracked(beta, address) == []
        forgotten.remember()
        at_rest(scene, "beta")
    assert len(tracked(beta, address)) == CONNECTIONS
