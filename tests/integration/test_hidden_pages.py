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
from tests.integration.command import Livemove, Said, migrate
from tests.integration.faults import criu_that_refuses_a_filter, held_criu
from tests.integration.scene import Scene

CODE = "/run/dumper-code"
UNPACK = f"base64 -d >{CODE}.tar.gz && mkdir {CODE} && tar -C {CODE} -xzf {CODE}.tar.gz"
MEMORY_MB = 48


@contextmanager
def code_on(host: Host) -> Iterator[None]:
    """The agent's code and the dumper, on a host."""
    host.run(["sh", "-ec", UNPACK], input=base64.b64encode(agent_bundle().compressed()).decode())
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
            seen, *more = dumped(lab.host("alpha"), scene, "no", "5")
            (unseen,) = dumped(lab.host("alpha"), scene, "yes")
        # A machine with other work may see too late that all tasks stand still, but not every time.
        assert any(each["before_held"] for each in (seen, *more))
        assert unseen["refusal"] == ""
        for each in (seen, unseen):  # the images in which CRIU is held come in that order
            assert each["epolls_in_time"]
            assert each["as_numbered"]
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
        assert checked["wrong_pages"] == 0, scene.wrong_pages()
    finally:
        scene.close()


#: Prints the counts of pages in all page maps that a source has written.
IMAGES = """\
import pathlib, dumper
maps = [dumper.entries(path) for path in pathlib.Path("/run/livemove").rglob("pagemap-*.img")]
for flag in (dumper._LAZY, dumper._PRESENT):
    print(sum(dumper.count_pages(dumper.with_flag(found, flag)) for found in maps))
"""


@pytest.mark.parametrize("name", ["counter", "echo"])
@pytest.mark.parametrize(("memory_mb", "hides"), [(16, False), (96, True)])
def test_a_move_hides_pages_where_that_is_faster(lab: Lab, name: str, memory_mb: int, hides: bool) -> None:
    """Memory of every kind. Told by the images on the source, in the middle of the freeze."""
    scene = Scene.start(lab, name, memory_mb=memory_mb, dirty_mb_s=3, program="memory_server")
    alpha = lab.host("alpha")
    try:
        with (
            held_criu(lab.host("beta")) as hold,
            Livemove(lab, "migrate", name, "--to", "beta", "--mode", "pre-copy", "--json") as move,
            code_on(alpha),
        ):
            move.said("alpha: frozen")  # on a busy machine 200 MB take a while until then
            hold.reached(move)
            found = alpha.run(["env", f"PYTHONPATH={CODE}", "python3", "-S", "-c", IMAGES]).stdout
            hold.go()
            said = move.finish()
        lazy, present = map(int, found.split())
        assert present > 0
        assert lazy == 0 if hides else lazy > memory_mb * 256 // 2
        check_moved(said, scene)
        assert "every page" not in said.stderr
    finally:
        scene.close()


def test_a_filter_that_is_refused_is_a_warning(lab: Lab) -> None:
    scene = Scene.start(lab, "echo", memory_mb=128, dirty_mb_s=3)
    try:
        with criu_that_refuses_a_filter(lab.host("alpha")):
            said = migrate(lab, "echo", "beta", "--mode", "pre-copy")
        (warning,) = [each for each in said.report["warnings"] if "every page" in each]
        assert "busy" in warning
        check_moved(said, scene)
    finally:
        scene.close()


def check_moved(said: Said, scene: Scene) -> None:
    assert (said.status, said.report["outcome"], said.report["mode"]) == (0, "moved", "pre-copy"), said.stderr
    scene.unharmed("beta")
    checked = scene.clients[0].check_memory()
    assert checked["pages"] > 0
    assert checked["wrong_pages"] == 0, scene.wrong_pages()


def total(said: dict[str, Any]) -> dict[str, int]:
    return {name: sum(each[name] for each in said["processes"]) for name in said["processes"][0]}
