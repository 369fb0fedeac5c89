"""Files of /dev/shm on their way: written through mappings and past them, made, renamed and removed meanwhile."""

from __future__ import annotations

import pytest

from labs.lab import Lab
from labs.machines import Host
from labs.workloads import listening_pids
from tests.integration.command import Livemove, migrate
from tests.integration.faults import held_criu, kill_agent
from tests.integration.scene import Scene
from tests.integration.test_memory import MEBIBYTE, move, remembers_everything, scene_of

FILES, ONE_FILE = "tmpfs_files", "tmpfs_server"


def what_is_mounted(host: Host, scene: Scene) -> str:
    """The service's /dev/shm, as mountinfo (proc(5)) has it, without the numbers."""
    (pid,) = listening_pids(host, scene.workload)
    lines = host.read_file(f"/proc/{pid}/mountinfo").splitlines()
    return next(line.partition(" / ")[2] for line in lines if " /dev/shm " in line)


def test_files_written_in_every_way(lab: Lab) -> None:
    """There and back twice, and by CRIU itself: each page, each name, each mode is checked after each move."""
    with scene_of(lab, "counter", 64, 3, FILES) as scene:
        mounted = what_is_mounted(lab.host("alpha"), scene)
        for mode, to in (
            ("pre-copy", "beta"),
            ("pre-copy", "alpha"),
            ("hybrid", "beta"),
            ("stop-copy", "alpha"),
            ("pre-copy", "beta"),
        ):
            copied = move(scene, to, "--mode", mode).report["bytes"]["pre_copy"]
            assert copied > 32 * MEBIBYTE or mode == "stop-copy"
            assert what_is_mounted(lab.host(to), scene) == mounted


def test_a_mapped_file_is_sent_before_the_freeze(lab: Lab) -> None:
    with scene_of(lab, "counter", 64, 3, ONE_FILE) as scene:
        for to in ("beta", "alpha", "beta", "alpha"):
            sent = move(scene, to).report["bytes"]
            assert sent["frozen"] < 16 * MEBIBYTE
            assert sent["pre_copy"] > 64 * MEBIBYTE


def test_of_a_process_tree_they_stay_with_the_host(lab: Lab) -> None:
    """Its /dev/shm is the host's: there is nothing that could be brought over for it alone."""
    with scene_of(lab, "echo", 8, 1) as scene:
        scene.lab.host("alpha").run(["sh", "-c", "head -c 4M /dev/zero >/dev/shm/of-the-host"])
        try:
            move(scene, "beta")
            assert scene.lab.host("beta").run(["ls", "/dev/shm"]).stdout == ""
        finally:
            scene.lab.host("alpha").run(["rm", "/dev/shm/of-the-host"])


@pytest.mark.parametrize("victim", ["alpha", "beta"])
def test_a_move_that_is_given_up_leaves_no_mount(lab: Lab, victim: str) -> None:
    with scene_of(lab, "counter", 32, 1, FILES) as scene:
        scene.begin_hop()
        going = Livemove(lab, "migrate", "counter", "--to", "beta", "--json")
        with held_criu(lab.host("beta")) as hold, going:
            hold.reached(going)
            kill_agent(lab.host(victim))
            hold.go()
            said = going.finish()
        assert (said.status, said.report["outcome"]) == (4, "rolled_back"), said.stderr
        remembers_everything(scene, "alpha")
        move(scene, "beta")


def test_too_much_is_written_and_the_move_is_given_up(lab: Lab) -> None:
    with scene_of(lab, "counter", 16, 100_000, ONE_FILE) as scene:
        scene.begin_hop()
        said = migrate(lab, "counter", "beta", "--max-freeze", "1", "--give-up", "abort")
        assert (said.status, said.code) == (4, "NOT_CONVERGING"), said.stderr
        remembers_everything(scene, "alpha")
