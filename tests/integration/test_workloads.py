"""The lab's services and clients on real hosts: they start, they stop, and the clients tell what happened to them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from labs import workloads
from labs.clients.control import Clients
from labs.commands import LabError
from labs.lab import Lab
from labs.workloads import PORT, Workload

DROP = (
    "add table ip lossy; add chain ip lossy in { type filter hook input priority 0; }; add rule ip lossy in tcp dport"
)


@pytest.fixture(params=["counter", "echo"])
def workload(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Workload]:
    """Both runtimes, running on alpha with some memory that changes."""
    workload = Workload.of_lab(lab, request.param, memory_mb=8, dirty_mb_s=2)
    workloads.stop(lab, workload)
    workloads.install(lab, workload)
    try:
        workloads.start(lab, workload, "alpha")
        yield workload
    finally:
        workloads.stop(lab, workload)


@pytest.fixture
def clients(lab: Lab, workload: Workload) -> Iterator[Clients]:
    with Clients(lab, workload.listens_on[0], PORT, connections=10) as clients:
        yield clients


def watch(clients: Clients, answers: int) -> None:
    """Let the clients work until there were so many answers."""
    wanted = clients.snapshot()["answers"] + answers
    for _ in range(400):
        if clients.snapshot()["answers"] >= wanted:
            return
        time.sleep(0.05)
    pytest.fail(f"{answers} answers did not come: {clients.snapshot()}")


def signal_service(lab: Lab, workload: Workload, name: str) -> None:
    alpha = lab.host("alpha")
    alpha.run(["kill", f"-{name}", *workloads.listening_pids(alpha, workload)])


def test_a_service_runs_where_it_was_started_and_every_byte_is_right(
    lab: Lab, workload: Workload, clients: Clients
) -> None:
    assert workloads.where(lab, workload) == ["alpha"]
    clients.begin_hop()
    watch(clients, 500)
    hop, memory = clients.end_hop(), clients.check_memory()
    assert (hop["connections"], hop["lost"], hop["resets"], hop["wrong_bytes"]) == (10, 0, 0, 0)
    assert hop["answers"] >= 500
    assert memory == {"pages": 2048, "wrong_pages": 0}
    whole = clients.stop()
    assert (whole["connections"], whole["lost"], whole["resets"], whole["wrong_bytes"]) == (10, 0, 0, 0)


def test_nothing_of_a_service_is_left_on_its_host(lab: Lab, workload: Workload) -> None:
    workloads.stop(lab, workload)
    alpha = lab.host("alpha")
    assert workloads.where(lab, workload) == []
    assert workload.listens_on[0] not in alpha.run(["ip", "address"]).stdout
    assert "pattern_server" not in alpha.run(["ps", "-eo", "args"]).stdout
    assert alpha.run(["find", "/sys/fs/cgroup", "-name", "counter"]).stdout == ""


def test_a_service_that_runs_already_is_not_started_again(lab: Lab, workload: Workload, clients: Clients) -> None:
    with pytest.raises(LabError, match="address add"):
        workloads.start(lab, workload, "alpha")
    watch(clients, 50)
    assert clients.stop()["lost"] == 0


def test_a_service_that_stands_still_is_a_gap_and_no_loss(lab: Lab, workload: Workload, clients: Clients) -> None:
    watch(clients, 50)
    clients.begin_hop()
    signal_service(lab, workload, "STOP")
    time.sleep(0.3)
    signal_service(lab, workload, "CONT")
    watch(clients, 200)
    hop = clients.end_hop()
    assert (hop["lost"], hop["resets"], hop["wrong_bytes"]) == (0, 0, 0)
    assert hop["longest_gap_ms"] >= 300
    assert min(hop["gaps_ms"]) >= 250  # every connection was in it


def test_lost_packets_are_retransmissions_and_no_loss(lab: Lab, workload: Workload, clients: Clients) -> None:
    watch(clients, 50)
    clients.begin_hop()
    try:
        lab.host("alpha").run(["nft", f"{DROP} {PORT} drop"])
        time.sleep(0.3)
    finally:
        lab.host("alpha").run(["nft", "delete table ip lossy"])
    watch(clients, 200)
    hop = clients.end_hop()
    assert (hop["lost"], hop["resets"], hop["wrong_bytes"]) == (0, 0, 0)
    assert hop["retransmissions"] > 0


def test_a_service_that_is_killed_is_noticed_on_every_connection(
    lab: Lab, workload: Workload, clients: Clients
) -> None:
    watch(clients, 50)
    clients.begin_hop()
    signal_service(lab, workload, "KILL")
    for _ in range(200):
        if clients.snapshot()["connections"] == 0:
            break
        time.sleep(0.05)
    hop = clients.end_hop()
    assert hop["connections"] == 10
    assert hop["lost"] + hop["resets"] == 10
    assert len(hop["troubles"]) == 10


def test_clients_of_a_service_that_is_not_there_say_so(lab: Lab) -> None:
    with pytest.raises(LabError, match=r"cannot talk to 192\.0\.2\.11 port 7000"):
        Clients(lab, lab.machine("alpha").address, PORT)
