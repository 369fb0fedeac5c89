"""Containers with a network namespace of their own: address and MAC are inside, and move with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from labs import config, workloads
from labs.lab import Lab
from labs.segment import BRIDGE
from tests.integration.command import Livemove, livemove, migrate
from tests.integration.faults import failing_criu, held_criu, kill_agent
from tests.integration.scene import CONNECTIONS, Scene

ADDRESSES = {"veth": ("192.0.2.230/24", "2001:db8::230/64"), "macvlan": ("192.0.2.231/24", "2001:db8::231/64")}
Kind = Literal["veth", "macvlan"]


@pytest.fixture(scope="module")
def bridged(lab: Lab) -> Iterator[Lab]:
    with lab.bridges():
        yield lab


@pytest.fixture(params=["veth", "macvlan"])
def scene(request: pytest.FixtureRequest, bridged: Lab) -> Iterator[Scene]:
    kind: Kind = request.param
    name = f"own{kind}"
    bridged.add_workload(
        config.Workload(name, "runc", ADDRESSES[kind], container=name, bundle=f"/srv/{name}", network=kind)
    )
    made = Scene.start(bridged, name, network=kind)
    try:
        yield made
    finally:
        made.close()
        for host in ("alpha", "beta", "gamma"):
            workloads.uninstall(bridged, made.workload, host)


def inside(scene: Scene, host: str) -> dict[str, Any]:
    """What the container's interface is like, without the kernel's numbers."""
    enter = ["nsenter", f"--net=/run/netns/{scene.workload.netns}"]
    machine = scene.lab.host(host)
    (link,) = json.loads(machine.run([*enter, "ip", "-j", "-d", "address", "show", "dev", "eth0"]).stdout)
    routes = [json.loads(machine.run([*enter, "ip", family, "-j", "route"]).stdout) for family in ("-4", "-6")]
    return {
        "mac": link["address"],
        "up": link["operstate"],
        "kind": link["linkinfo"]["info_kind"],
        "mtu": link["mtu"],
        "addresses": sorted(each["local"] for each in link["addr_info"]),
        "routes": sorted((route["dst"], route.get("gateway", "")) for family in routes for route in family),
    }


def test_there_and_back_on_the_same_connections(scene: Scene) -> None:
    before = inside(scene, "alpha")
    assert before["mac"] == workloads.mac_of(scene.workload)
    for destination in ("beta", "alpha", "beta"):
        scene.begin_hop()
        said = migrate(scene.lab, scene.workload.name, destination)
        assert said.status == 0, said.stdout + said.stderr
        assert said.report["connections"] == {"established": CONNECTIONS, "restored": CONNECTIONS}
        scene.unharmed(destination)
        assert inside(scene, destination) == before


def test_a_move_that_fails_leaves_it_as_it_was(scene: Scene) -> None:
    before = inside(scene, "alpha")
    scene.begin_hop()
    with failing_criu(scene.lab.host("beta"), "swrk"):
        said = migrate(scene.lab, scene.workload.name, "beta")
    assert said.status == 4, said.stdout + said.stderr
    scene.unharmed("alpha")
    assert inside(scene, "alpha") == before


def test_a_source_whose_agent_is_killed_is_recovered(scene: Scene) -> None:
    before = inside(scene, "alpha")
    scene.begin_hop()
    command = ("migrate", scene.workload.name, "--to", "beta", "--json")
    with held_criu(scene.lab.host("beta")) as hold, Livemove(scene.lab, *command) as move:
        hold.reached(move)
        kill_agent(scene.lab.host("alpha"))
        hold.go()
        said = move.finish()
    assert said.status == 4, said.stdout + said.stderr
    scene.unharmed("alpha")
    assert inside(scene, "alpha") == before


def test_check_tells_what_the_destination_lacks(bridged: Lab, scene: Scene) -> None:
    beta, name = bridged.host("beta"), scene.workload.name
    wanted = {"NAMESPACE_TAKEN"}
    beta.run(["ip", "netns", "add", name])
    try:
        if scene.workload.network == "veth":
            wanted.add("NAMESPACE_PARENT_MISSING")
            beta.run(["ip", "link", "set", BRIDGE, "name", "br9"])
        said = livemove(bridged, "check", name, "--to", "beta", "--json")
    finally:
        beta.run(["ip", "netns", "delete", name])
        beta.run(["ip", "link", "set", "br9", "name", BRIDGE], check=False)
    assert said.status == 3
    assert wanted <= {each["code"] for each in said.report["findings"]}
    scene.unharmed("alpha")
