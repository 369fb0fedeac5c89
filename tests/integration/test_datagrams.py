"""UDP: a thousand datagrams a second through a move, to a socket for all clients and to sockets connected to one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from labs import config, workloads
from labs.clients.control import ClientProcess
from labs.lab import Lab
from labs.workloads import PORT, Workload
from tests.integration.command import migrate
from tests.integration.faults import until
from tests.integration.test_capture import Wire

ADDRESSES = ("192.0.2.215/24", "2001:db8::215/64")
KNOWN = config.Workload("datagrams", "process", ADDRESSES, pid_file="/run/datagrams.pid")


class Datagrams(ClientProcess):
    """The running clients (`labs/clients/datagrams.py`)."""

    def __init__(self, lab: Lab, addresses: list[str]) -> None:
        where = [word for address in addresses for word in ("--address", address)]
        super().__init__(lab, "labs.clients.datagrams", [*where, "--port", str(PORT)])

    def seen(self) -> list[dict[str, Any]]:
        """What each client has seen."""
        return list(self._ask("snapshot")["clients"])


def test_a_thousand_datagrams_a_second_there_and_back(lab: Lab, tmp_path: Path) -> None:
    lab.add_workload(KNOWN)
    workload = replace(Workload.of_lab(lab, KNOWN.name), program="datagram_server")
    patient = tmp_path / "livemove.toml"  # on a busy machine the service may not run for longer than the usual 5 ms
    patient.write_text(f"{lab.config_path.read_text()}\n[policy]\nsettle_s = 2.0\n")
    workloads.stop(lab, workload)
    workloads.install(lab, workload)
    workloads.start(lab, workload, "alpha")
    try:
        with Datagrams(lab, workload.listens_on) as clients:
            with lab.capture(tmp_path / "move.pcap") as capture:
                for destination in ("beta", "alpha"):
                    before = [client["answered"] for client in clients.seen()]
                    said = migrate(lab, KNOWN.name, destination, config=patient)
                    assert said.status == 0, said.stderr
                    assert [each for each in said.report["warnings"] if "CAP_SYS_RESOURCE" not in each] == []
                    until(lambda before=before: answers_since(before, clients) > 100, "answers")  # type: ignore[misc]
            seen = clients.stop()["clients"]
    finally:
        workloads.stop(lab, workload)
    assert len(seen) == 4
    assert all(client["sent"] > 200 for client in seen)
    assert [{**client, "sent": client["answered"]} for client in seen] == seen, "none is lost"
    assert sum(client["refused"] + client["disordered"] for client in seen) == 0, seen
    wire = Wire.read(capture.path)
    assert (capture.dropped, wire.unreachable) == (0, [])


def answers_since(before: list[int], clients: Datagrams) -> int:
    """How many more answers the client with the fewest has."""
    return min(int(client["answered"]) - had for client, had in zip(clients.seen(), before, strict=True))
