"""What is between two states in the very moment in which packets are diverted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from labs import config
from labs.clients.control import ClientProcess
from labs.lab import Lab
from tests.integration.command import migrate
from tests.integration.faults import until
from tests.integration.scene import Scene

WORKLOAD = config.Workload("late", "process", ("192.0.2.243/24",), pid_file="/run/late.pid")
CLIENT = "192.0.2.199"


class LateClient(ClientProcess):
    """`late_client` in the clients machine."""

    def __init__(self, lab: Lab, service: str) -> None:
        mac = lab.machine("clients").mac
        super().__init__(lab, "tests.integration.late_client", [mac, CLIENT, service])

    def seen(self) -> dict[str, Any]:
        return self._ask("seen")


def test_what_opens_and_closes_in_the_moment_of_the_divert(lab: Lab, tmp_path: Path) -> None:
    """The last packets come to the destination alone, after it has announced the address, and belong to connections
    that no process on the source has. Nobody may be reset, and what is opened has to work."""
    lab.add_workload(WORKLOAD)
    # There is always something unfinished, for which it is of no use to wait before the divert; and after it a machine
    # that is busy with other tests may need more time than a client has otherwise.
    patient = tmp_path / "livemove.toml"
    patient.write_text(f"{lab.config_path.read_text()}\n[policy]\nclose_s = 0.001\nsettle_s = 2.0\n")
    scene = Scene.start(lab, WORKLOAD.name)
    try:
        with LateClient(lab, scene.workload.listens_on[0]) as client:
            scene.begin_hop()
            said = migrate(lab, WORKLOAD.name, "beta", config=patient)
            assert said.status == 0, said.stderr
            until(lambda: client.seen()["answered"] >= client.seen()["opened_late"], client.seen)
            seen = client.seen()
            scene.unharmed("beta")
        assert min(seen["opened_late"], seen["closed_late"]) > 0
        assert (seen["resets"], seen["wrong_bytes"]) == ([], 0)
    finally:
        scene.close()
