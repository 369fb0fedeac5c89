"""The lab's bookkeeper on a host: what its files are, whether its books are in order, and how they move with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from labs.machines import Host
from labs.programs.bookkeeper import STILL
from labs.workloads import BOOKKEEPER, CODE
from tests.integration.command import migrate
from tests.integration.faults import until
from tests.integration.scene import Scene


def look(host: Host, folder: str) -> dict[str, Any]:
    """All entries of a folder, with all that a file system knows of them."""
    found: dict[str, Any] = json.loads(
        host.run(["env", f"PYTHONPATH={CODE}", "python3", "-m", BOOKKEEPER, "--look", folder]).stdout
    )
    return found


def audited(host: Host, folder: str, more: int = 50) -> int:
    """The service goes on for a while and finds its books in order; how many entries they have."""

    def audit() -> dict[str, Any]:
        said: dict[str, Any] = json.loads(host.read_file(f"{folder}/audit"))
        assert said["wrong"] == []
        return said

    before = audit()["entries"]
    until(lambda: audit()["entries"] >= before + more, "more entries")
    return int(audit()["entries"])


def move_along(scene: Scene, *destinations: str, config: Path | None = None) -> None:
    """The service moves from alpha to one host after the other, and all its files with it."""
    data = scene.workload.data
    still, entries = look(scene.lab.host("alpha"), f"{data}/{STILL}"), 0
    for destination in destinations:
        scene.begin_hop()
        said = migrate(scene.lab, scene.workload.name, destination, config=config)
        assert said.status == 0, said.stdout + said.stderr
        scene.unharmed(destination)
        host = scene.lab.host(destination)
        assert look(host, f"{data}/{STILL}") == still
        assert entries < (entries := audited(host, data))
