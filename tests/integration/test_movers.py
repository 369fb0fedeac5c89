"""Other ways for an address to move than on one segment, a segment that does not follow, and a firewall in the way."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from labs import config
from labs.lab import Lab
from labs.topology import INTERFACE
from tests.integration.command import Livemove, livemove, migrate
from tests.integration.faults import held_criu
from tests.integration.scene import CONNECTIONS, Scene
from tests.integration.ways import (
    HOOK,
    HOOK_SCRIPT,
    HOSTS,
    KEY,
    KNOWN_HOSTS,
    diary,
    installed_hook,
    next_hop,
    router,
    warnings,
)

HOOKED, ROUTED = "192.0.2.219", "198.51.100.200"


@pytest.fixture
def hooked(lab: Lab) -> Iterator[Scene]:
    workload = config.Workload(
        "hooked", "process", (f"{HOOKED}/24",), pid_file="/run/hooked.pid", mover="hook", hook=HOOK
    )
    lab.add_workload(workload)
    with installed_hook(lab):
        scene = Scene.start(lab, "hooked")
        try:
            yield scene
        finally:
            scene.close()


def test_a_hook_moves_the_address_there_and_back(lab: Lab, hooked: Scene) -> None:
    for here, there in (HOSTS, HOSTS[::-1]):
        hooked.begin_hop()
        said = migrate(lab, "hooked", there)
        assert said.status == 0, said.stderr
        assert warnings(said) == []
        hooked.unharmed(there)
        assert diary(lab, here) == [f"{action} source {here} {there}" for action in ("divert", "released")]
        assert diary(lab, there) == [f"{action} destination {here} {there}" for action in ("divert", "released")]


def test_a_hook_takes_the_address_back_when_the_move_is_interrupted(lab: Lab, hooked: Scene) -> None:
    hooked.begin_hop()
    with held_criu(lab.host("beta")) as hold, Livemove(lab, "migrate", "hooked", "--to", "beta", "--json") as move:
        hold.reached(move)
        move.signal(signal.SIGINT)
        hooked.answers(CONNECTIONS)  # at once, while the destination's CRIU is still where it was
        hold.go()
        said = move.finish()
    assert said.status == 130, said.stderr
    hooked.unharmed("alpha")
    assert diary(lab, "alpha") == [f"{action} source alpha beta" for action in ("divert", "back")]
    assert diary(lab, "beta") == [f"{action} destination alpha beta" for action in ("divert", "back")]


@pytest.mark.parametrize("failing", HOSTS)
def test_a_hook_that_fails_is_a_roll_back(lab: Lab, hooked: Scene, failing: str) -> None:
    """Where it fails on, it fails to go back too: that is left for a recovery, with the service running."""
    hooked.begin_hop()
    lab.host(failing).run(["touch", "/run/move-address.fails"])
    said = migrate(lab, "hooked", "beta")
    assert said.status == 4, said.stderr
    assert "exit status 1: error: the cloud is out of order" in said.report["error"]["message"]
    assert hooked.host == "alpha"
    lab.host(failing).run(["rm", "/run/move-address.fails"])
    recovered = livemove(lab, "recover", said.report["id"], "--json")
    assert recovered.status == 0, recovered.stderr
    hooked.unharmed("alpha")
    assert diary(lab, failing)[-1].startswith("back ")


def test_a_hook_that_is_missing_is_found_before(lab: Lab, hooked: Scene) -> None:
    lab.host("beta").run(["rm", HOOK])
    said = migrate(lab, "hooked", "beta")
    assert said.status == 3
    assert "HOOK_UNUSABLE" in said.stderr
    assert f"{HOOK} is missing" in said.stderr
    lab.host("beta").write_file(HOOK, HOOK_SCRIPT, 0o644)
    assert f"{HOOK} is not executable" in livemove(lab, "doctor", "beta").stdout
    hooked.unharmed("alpha")


# ---- a router


@pytest.fixture
def routed(lab: Lab) -> Iterator[Scene]:
    gamma = lab.host("gamma").address
    workload = config.Workload(
        "routed",
        "process",
        (f"{ROUTED}/32",),
        pid_file="/run/routed.pid",
        mover="route",
        router=f"root@{gamma}",
        router_key=KEY,
        router_known_hosts=KNOWN_HOSTS,
    )
    lab.add_workload(workload)
    with router(lab, ROUTED):
        scene = Scene.start(lab, "routed")
        try:
            yield scene
        finally:
            scene.close()


def test_a_route_is_changed_on_the_router_there_and_back(lab: Lab, routed: Scene) -> None:
    for there in ("beta", "alpha"):
        routed.begin_hop()
        said = migrate(lab, "routed", there)
        assert said.status == 0, said.stderr
        assert warnings(said) == []
        assert next_hop(lab, ROUTED) == lab.host(there).address
        routed.unharmed(there)


def test_the_route_goes_back_when_the_move_is_interrupted(lab: Lab, routed: Scene) -> None:
    routed.begin_hop()
    with held_criu(lab.host("beta")) as hold, Livemove(lab, "migrate", "routed", "--to", "beta", "--json") as move:
        hold.reached(move)
        assert next_hop(lab, ROUTED) == lab.host("beta").address
        move.signal(signal.SIGINT)
        routed.answers(CONNECTIONS)  # at once, while the destination's CRIU is still where it was
        hold.go()
        said = move.finish()
    assert said.status == 130, said.stderr
    assert next_hop(lab, ROUTED) == lab.host("alpha").address
    routed.unharmed("alpha")


def test_a_router_that_cannot_be_used_is_found_before(lab: Lab, routed: Scene) -> None:
    gamma = lab.host("gamma")
    gamma.run(["ip", "route", "replace", f"{ROUTED}/32", "via", lab.host("beta").address])
    said = livemove(lab, "check", "routed", "--to", "beta")
    assert said.status == 3
    assert "ROUTE_NOT_TO_SOURCE" in said.stdout
    gamma.run(["ip", "route", "replace", f"{ROUTED}/32", "via", lab.host("alpha").address])
    lab.host("alpha").run(["rm", KEY])
    said = livemove(lab, "check", "routed", "--to", "beta")
    assert said.status == 3
    assert "ROUTER_UNREACHABLE" in said.stdout
    assert "Permission denied" in said.stdout
    routed.unharmed("alpha")


# ---- the segment, the firewall


@pytest.fixture
def echo(lab: Lab) -> Iterator[Scene]:
    scene = Scene.start(lab, "echo")
    try:
        yield scene
    finally:
        scene.close()


@contextmanager
def deaf_switch(lab: Lab, address: str) -> Iterator[None]:
    """A switch that lets no ARP of the address pass that comes from beta."""
    enter = ["nsenter", f"--net={lab.paths.netns('segment')}", "nft"]
    rule = f"iifname beta arp saddr ip {address} drop"
    text = f"table bridge deaf {{\nchain c {{\ntype filter hook forward priority 0;\n{rule}\n}}\n}}\n"
    subprocess.run([*enter, "-f", "-"], input=text, text=True, check=True)
    try:
        yield
    finally:
        subprocess.run([*enter, "delete", "table", "bridge", "deaf"], check=True)


def test_a_segment_that_does_not_follow_is_a_warning(lab: Lab, echo: Scene) -> None:
    (address,) = echo.workload.listens_on
    echo.begin_hop()
    with deaf_switch(lab, address):
        said = migrate(lab, "echo", "beta")
    assert said.status == 0, said.stderr
    (warning,) = warnings(said)
    assert warning == (
        f"the segment does not follow: {lab.machine('clients').address} did not acknowledge that {address} has moved, "
        "and may still send to the old host"
    )
    netfix = [str(Path(sys.executable).with_name("netfix")), "announce", address, "--interface", INTERFACE]
    subprocess.run(["nsenter", f"--net={lab.paths.netns('beta')}", *netfix], check=True, capture_output=True)
    echo.unharmed("beta")


def test_a_firewall_on_the_destination_is_found_before(lab: Lab, echo: Scene) -> None:
    beta = lab.host("beta")
    rules = "type filter hook input priority 0; policy drop;\niif lo accept\nct state established,related accept\n"
    beta.run(["nft", "-f", "-"], input=f"table inet filter {{\nchain input {{\n{rules}tcp dport 22 accept\n}}\n}}\n")
    try:
        said = migrate(lab, "echo", "beta")
        assert said.status == 3
        assert "FIREWALL_DROPS" in said.stderr
        assert f"inet filter input drops what comes to tcp {echo.workload.listens_on[0]} port 7000" in said.stderr
        beta.run(["nft", "add rule inet filter input tcp dport 7000 accept"])
        assert "FIREWALL_DROPS" not in livemove(lab, "check", "echo", "--to", "beta").stdout
    finally:
        beta.run(["nft", "delete table inet filter"])
    echo.unharmed("alpha")
