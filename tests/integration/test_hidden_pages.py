"""A dump of real workloads that does not see what the destination has, and lets them run on."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from coordinator.bundle import agent_bundle
from labs.lab import Lab
from labs.machines import Host
from tests.integration import dumper
from tests.integration.scene import Scene

CODE = "/run/dumper-code"
UNPACK = f"base64 -d >{CODE}.tar.gz && mkdir {CODE} && tar -C {CODE} -xzf {CODE}.tar.gz"
MEMORY_MB = 48


@contextmanager
def code_on(host: Host) -> Iterator[None]:
    """The agent's code and the dumper, on a host."""
    host.run(["sh", "-ec", UNPACK], input=base64.b64encode(agent_bundle().archive).decode())
    host.write_file(f"{CODE}/dumper.py", Path(dumper.__file__).read_text())
    try:
        yield
    finally:
        host.run(["rm", "-r", CODE, f"{CODE}.tar.gz"])


def dumped(host: Host, scene: Scene, *options: str) -> list[dict[str, Any]]:
    """What `dumper.py` says."""
    known = scene.workload
    spec = {
        "name": known.name,
        "runtime": known.runtime,
        "addresses": known.addresses,
        "container": known.container,
        "bundle": known.bundle,
        "pid_file": known.pid_file,
    }
    argv = ["env", f"PYTHONPATH={CODE}", "python3", "-S", f"{CODE}/dumper.py", json.dumps(spec), *options]
    said = json.loads(host.run(argv, timeout=300).stdout)
    assert isinstance(said, list)
    return said


@pytest.mark.parametrize("name", ["counter", "echo"])
def test_hidden_pages_are_in_no_image_and_all_others_are(lab: Lab, name: str) -> None:
    """Of a container and of a process tree: private, shared, of files, forked, growing; and it goes on unharmed."""
    scene = Scene.start(lab, name, memory_mb=MEMORY_MB, dirty_mb_s=3, program="memory_server")
    try:
        with code_on(lab.host("alpha")):
            (seen,) = dumped(lab.host("alpha"), scene, "no")
            (unseen,) = dumped(lab.host("alpha"), scene, "yes")
        assert unseen["refusal"] == ""
        before, after = total(seen), total(unseen)
        assert (before["lost"], after["lost"], after["told"]) == (0, 0, 0)
        assert (before["hidden"], after["lazy"]) == (0, 0)
        assert min(before["lazy"], after["hidden"]) > MEMORY_MB * 256 // 2
        assert min(before["present"], after["present"]) > 0
        assert min(each["hidden"] for each in unseen["processes"]) > 0
        assert len(unseen["processes"]) > 1
        scene.unharmed("alpha")
        checked = scene.clients[0].check_memory()
        assert checked["pages"] > 0
        assert checked["wrong_pages"] == 0
    finally:
        scene.close()


def total(said: dict[str, Any]) -> dict[str, int]:
    return {name: sum(each[name] for each in said["processes"]) for name in said["processes"][0]}
