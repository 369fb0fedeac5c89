"""Containers with a network of their own, whose packets come over a router or by what a hook does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Literal

import pytest

from labs import config, workloads
from labs.lab import Lab
from labs.segment import BRIDGE, BRIDGE_PORT
from labs.topology import HOSTS as HOST_STATIONS
from labs.topology import INTERFACE
from tests.integration.command import Livemove, Said, livemove, migrate
from tests.integration.faults import held_criu, until
from tests.integration.scene import Scene
from tests.integration.ways import (
    DIARY_SCRIPT,
    HOOK,
    HOSTS,
    KEY,
    KNOWN_HOSTS,
    diary,
    installed_hook,
    next_hop,
    router,
    warnings,
)

HOOKED = {"veth": "192.0.2.232", "macvlan": "192.0.2.233"}
ROUTED, UNREACHABLE = "198.51.100.210", "198.51.100.211"


@contextmanager
def forwarding(lab: Lab, address: str) -> Iterator[None]:
    """Both hosts pass on what comes for the address to the container on their bridge. The bridge has an address for
    that: without one the host would ask there for the container with the other interface's."""
    up = "sysctl -qw net.ipv4.ip_forward=1; ip address add {own} dev {bridge}; ip route add {address}/32 dev {bridge}"
    down = "sysctl -qw net.ipv4.ip_forward=0; ip address del {own} dev {bridge}"
    with ExitStack() as undo:
        for station in (each for each in HOST_STATIONS if each.name in HOSTS):
            words = {"own": f"198.51.100.{station.number}/32", "bridge": BRIDGE, "address": address}
            host = lab.host(station.name)
            undo.callback(host.run, ["sh", "-c", down.format(**words)])
            host.run(["sh", "-ec", up.format(**words)])
        yield


@contextmanager
def scene_of(lab: Lab, workload: config.Workload) -> Iterator[Scene]:
    lab.add_workload(workload)
    scene = Scene.start(lab, workload.name, network=workload.network)
    try:
        yield scene
    finally:
        scene.close()
        for host in ("alpha", "beta", "gamma"):
            workloads.uninstall(lab, scene.workload, host)


@pytest.fixture(scope="module")
def bridged(lab: Lab) -> Iterator[Lab]:
    with lab.bridges():
        yield lab


def routed(lab: Lab, name: str, address: str) -> config.Workload:
    return config.Workload(
        name,
        "runc",
        (f"{address}/32",),
        container=name,
        bundle=f"/srv/{name}",
        network="veth" if address == ROUTED else "macvlan",
        mover="route",
        router=f"root@{lab.host('gamma').address}",
        router_key=KEY,
        router_known_hosts=KNOWN_HOSTS,
    )


def remember_where_it_is(lab: Lab, scene: Scene, host: str) -> None:
    """As on a host on which the container was lately: it knows the MAC, and its bridge that it is elsewhere now."""
    known = [ROUTED, "lladdr", workloads.mac_of(scene.workload), "nud", "stale", "dev", BRIDGE]
    lab.host(host).run(["ip", "neighbour", "replace", *known])
    # It asks the segment where its neighbours are, and every bridge sees that.
    lab.host(scene.host).run(["ip", "-n", scene.workload.netns, "neighbour", "flush", "dev", "eth0"])
    until(lambda: port_of(lab, scene, host) == BRIDGE_PORT, f"a bridge of {host} that knows the MAC")


def unfollowed(said: Said) -> list[str]:
    """Warnings that somebody did not follow."""
    return [each for each in warnings(said) if "segment" in each or "router" in each or "answers for" in each]


def port_of(lab: Lab, scene: Scene, host: str) -> str:
    """Behind which port of its bridge a host expects the container."""
    mac = workloads.mac_of(scene.workload)
    known = lab.host(host).run(["bridge", "fdb", "show", "br", BRIDGE]).stdout.splitlines()
    return next((line.split()[2] for line in known if line.startswith(mac) and "permanent" not in line), "")


def test_over_a_router_there_and_back(bridged: Lab) -> None:
    """Router, host and bridge pass packets on. From the divert on the destination's bridge has them for the container
    that is to come, also on the way back, when it has learned that this MAC is somewhere else."""
    with (
        router(bridged, ROUTED),
        forwarding(bridged, ROUTED),
        scene_of(bridged, routed(bridged, "ownroute", ROUTED)) as scene,
    ):
        for there in ("beta", "alpha"):
            scene.begin_hop()
            remember_where_it_is(bridged, scene, there)
            command = ("migrate", scene.workload.name, "--to", there, "--json")
            with held_criu(bridged.host(there)) as hold, Livemove(bridged, *command) as move:
                hold.reached(move)
                learned = port_of(bridged, scene, there)
                hold.go()
                said = move.finish()
            assert said.status == 0, said.stderr
            assert learned == f"v-{scene.workload.name}"
            assert unfollowed(said) == []
            assert next_hop(bridged, ROUTED) == bridged.host(there).address
            scene.unharmed(there)


def test_a_destination_that_does_not_pass_packets_on_is_found_before(bridged: Lab) -> None:
    with (
        router(bridged, ROUTED),
        forwarding(bridged, ROUTED),
        scene_of(bridged, routed(bridged, "ownroute", ROUTED)) as scene,
    ):
        bridged.host("beta").run(["ip", "route", "replace", f"{ROUTED}/32", "dev", INTERFACE])
        said = livemove(bridged, "check", scene.workload.name, "--to", "beta")
        assert said.status == 3
        assert f"has to go on to {BRIDGE}: beta passes it on to {INTERFACE}" in said.stdout
        bridged.host("beta").run(["sysctl", "-qw", "net.ipv4.ip_forward=0"])
        said = livemove(bridged, "check", scene.workload.name, "--to", "beta")
        assert f"has to go on to {BRIDGE}: beta does not pass it on" in said.stdout


def test_a_macvlan_behind_a_router_is_refused(bridged: Lab) -> None:
    """And for good reason: not even the host that it is on can pass anything on to it."""
    known = routed(bridged, "ownlan", UNREACHABLE)
    bridged.add_workload(known)
    workload = replace(workloads.Workload.of_lab(bridged, "ownlan"), network="macvlan")
    alpha = bridged.host("alpha")
    workloads.install(bridged, workload)
    with router(bridged, UNREACHABLE):
        workloads.start(bridged, workload, "alpha")
        try:
            alpha.run(["ip", "route", "add", f"{UNREACHABLE}/32", "dev", INTERFACE])
            connect = f"timeout 1 bash -c '</dev/tcp/{UNREACHABLE}/{workloads.PORT}'"
            assert alpha.run(["sh", "-c", connect], check=False).returncode != 0
            said = livemove(bridged, "check", "ownlan", "--to", "beta")
        finally:
            alpha.run(["ip", "route", "del", f"{UNREACHABLE}/32"], check=False)
            workloads.stop(bridged, workload)
            for host in ("alpha", "beta", "gamma"):
                workloads.uninstall(bridged, workload, host)
    assert said.status == 3
    assert "MACVLAN_BEHIND_ROUTER" in said.stdout


@pytest.mark.parametrize("network", ["veth", "macvlan"])
def test_a_hook_beside_the_announcements(bridged: Lab, network: Literal["veth", "macvlan"]) -> None:
    """A hook that changes nothing on the segment: the container takes its MAC along, and the switches are told."""
    name = f"hook{network}"
    workload = config.Workload(
        name,
        "runc",
        (f"{HOOKED[network]}/24",),
        container=name,
        bundle=f"/srv/{name}",
        network=network,
        mover="hook",
        hook=HOOK,
    )
    with installed_hook(bridged, DIARY_SCRIPT), scene_of(bridged, workload) as scene:
        for here, there in (HOSTS, HOSTS[::-1]):
            scene.begin_hop()
            said = migrate(bridged, name, there)
            assert said.status == 0, said.stderr
            assert unfollowed(said) == []
            scene.unharmed(there)
            assert diary(bridged, here) == [f"{action} source {here} {there}" for action in ("divert", "released")]
            assert diary(bridged, there) == [
                f"{action} destination {here} {there}" for action in ("divert", "released")
            ]
