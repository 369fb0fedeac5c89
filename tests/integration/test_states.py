"""Connections in every state that CRIU can dump, moved there and back, beside a twin that is not moved."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from socket import IPPROTO_TCP

import pytest

from labs import config
from labs.lab import Lab
from tests.integration.command import Livemove, Said, migrate
from tests.integration.faults import held_criu, until
from tests.integration.puppets import IPV4_PORT, IPV6_PORT, Pair, go_on, pair
from tests.integration.scene import left_over
from tests.integration.stories import SMALL, STORIES

MOVED = config.Workload("states", "process", ("192.0.2.213/24", "2001:db8::213/64"), pid_file="/run/states.pid")
TWIN = config.Workload("twin", "process", ("192.0.2.214/24", "2001:db8::214/64"), pid_file="/run/twin.pid")

#: What CRIU changes, and docs/how-it-works.md says so.
CHANGED = (
    f" {IPPROTO_TCP} {socket.TCP_USER_TIMEOUT}'",
    "'CLOSING'), and the twin LAST_ACK",
)


@pytest.fixture
def one(lab: Lab) -> Iterator[Pair]:
    with pair(lab, MOVED, "alpha") as made:
        yield made


def lost(said: Said) -> list[str]:
    """What the result warns of, but for what is said of the hosts themselves."""
    return [warning for warning in said.report["warnings"] if "CAP_SYS_RESOURCE" not in warning]


def move(lab: Lab, destination: str, least: int = 30) -> None:
    """Move the service with so many connections or more, of which none is lost."""
    said = migrate(lab, MOVED.name, destination)
    assert said.status == 0, said.stderr
    assert lost(said) == []
    connections = said.report["connections"]
    assert connections["established"] == connections["restored"] >= least


def test_every_state_there_and_back(lab: Lab, one: Pair) -> None:
    destinations = iter(("beta", "alpha"))
    with pair(lab, TWIN, "gamma") as twin:
        for _ in go_on([one, twin], STORIES):
            move(lab, next(destinations))
    assert len(one.seen) > 100
    different = [f"{a}, and the twin {b[1]}" for a, b in zip(one.seen, twin.seen, strict=True) if a != b]
    unknown = [each for each in different if not any(known in each for known in CHANGED)]
    assert unknown == [], "\n".join(unknown)
    assert left_over(lab, one.workload, "alpha") == []


def test_connections_that_the_service_does_not_accept(lab: Lab, one: Pair) -> None:
    """A full accept queue: the move is given up before anything is diverted, and none of them is harmed."""
    one.service("listen", "queue", address=one.address, port=7200, backlog=3)
    waiting = [f"waiting {number}" for number in range(4)]
    for name in waiting:
        one.client("connect", name, address=one.address, port=7200)
        one.client("connected", name)
        one.client("send", name, size=500)
    one.connect("idle beside a queue")
    said = migrate(lab, MOVED.name, "beta")
    assert (said.status, said.code) == (4, "NOT_ACCEPTING"), said.stderr
    assert "4 connection(s) to 192.0.2.213:7200 wait to be accepted" in said.report["error"]["message"]
    assert "DIVERTED" not in [phase["name"] for phase in said.report["phases"]]
    assert left_over(lab, one.workload, "alpha") == []
    for name in waiting:
        one.service("accept", name, listener="queue")
    move(lab, "beta", least=5)
    for name in [*waiting, "idle beside a queue"]:
        one.to_service(name, 500) if name in waiting else one.exchange(name)
        one.exchange(name)
    move(lab, "alpha", least=5)


def test_a_peer_sends_again_and_connects_while_its_packets_are_held(lab: Lab, one: Pair) -> None:
    ports = (IPV4_PORT, IPV6_PORT)
    for port in ports:
        one.connect(f"again {port}", port)
    with held_criu(lab.host("beta")) as hold, Livemove(lab, "migrate", MOVED.name, "--to", "beta", "--json") as command:
        hold.reached(command)
        for port in ports:
            one.client("send", f"again {port}", size=20_000)
            address = one.address6 if port == IPV6_PORT else one.address
            one.client("connect", f"new {port}", address=address, port=port)
        for name in [f"{kind} {port}" for kind in ("again", "new") for port in ports]:
            until(lambda name=name: one.client("state", name)["sent_again"] > 0, name)  # type: ignore[misc]
        hold.go()
        said = command.finish()
    assert said.status == 0, said.stderr
    assert lost(said) == []
    for port in ports:
        one.to_service(f"again {port}", 20_000)
        one.exchange(f"again {port}")
        one.client("connected", f"new {port}")
        one.service("accept", f"new {port}", listener=str(port))
        one.exchange(f"new {port}")
    move(lab, "alpha", least=5)


def with_close_s(lab: Lab, folder: Path, seconds: float) -> Path:
    """The lab's configuration with another bound for what is closed."""
    path = folder / "livemove.toml"
    path.write_text(f"{lab.config_path.read_text()}\n[policy]\nclose_s = {seconds}\n")
    return path


def test_what_the_service_has_closed_is_delivered_before_the_move(lab: Lab, one: Pair, tmp_path: Path) -> None:
    """The client has no room for the last words, and nobody has the connection any more: the move waits."""
    one.connect("last words", options=SMALL)
    sent = one.service("fill", "last words")["bytes"]
    one.service("close", "last words")
    config_path = with_close_s(lab, tmp_path, 60.0)
    command = ("migrate", MOVED.name, "--to", "beta", "--json")
    with Livemove(lab, *command, config=config_path) as running:
        running.said("alpha: copying")
        one.to_client("last words", sent)
        one.note("last words", one.client("end", "last words"))
        said = running.finish()
    assert said.status == 0, said.stderr
    assert lost(said) == []
    assert one.seen[-1] == ("last words", {"rest": 0})
    move(lab, "alpha", least=1)


def test_what_cannot_be_delivered_is_told(lab: Lab, one: Pair, tmp_path: Path) -> None:
    """A client that does not take its last bytes, and datagrams that the service does not read."""
    one.connect("no room", options=SMALL)
    one.service("fill", "no room")
    one.service("close", "no room")
    one.service("datagrams", "unread", address=one.address, port=7300)
    one.client("datagrams", "unread", address="0.0.0.0", port=0, peer=(one.address, 7300))
    one.client("send_text", "unread", text="hello")
    said = migrate(lab, MOVED.name, "beta", config=with_close_s(lab, tmp_path, 0.2))
    assert said.status == 0, said.stderr
    datagrams, closed = lost(said)
    assert "datagrams that the service had received and not read are lost" in datagrams
    assert datagrams.endswith(": 192.0.2.213:7300")
    assert "1 connection(s) that the service had closed are cut" in closed
    one.client("send_text", "unread", text="again")
    assert one.service("receive_text", "unread", size=9) == {"text": "again"}
    move(lab, "alpha", least=1)
