"""Memory on its way: every kind, every mode, writes faster than the link, trouble in rounds and while filling in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from signal import SIGKILL

import pytest

from labs import workloads
from labs.lab import Lab
from labs.machines import Host
from labs.workloads import listening_pids
from tests.integration.command import Livemove, Said, livemove, migrate
from tests.integration.faults import (
    agents,
    drop_session,
    filling_stopped,
    kill_agent,
    largest_file,
    last_phase,
    signal_agent,
    traced,
    until,
)
from tests.integration.scene import Scene, left_over

ALL_KINDS, SEGMENTS, SHARED, MEMFD = "memory_server", "segment_server", "shared_server", "memfd_server"
MODES = ("pre-copy", "post-copy", "hybrid", "stop-copy")
MEBIBYTE = 1 << 20


@contextmanager
def scene_of(
    lab: Lab, name: str, memory_mb: int, dirty_mb_s: float, program: str = "pattern_server"
) -> Iterator[Scene]:
    scene = Scene.start(lab, name, memory_mb=memory_mb, dirty_mb_s=dirty_mb_s, program=program)
    try:
        yield scene
    except BaseException:
        settle(lab)
        raise
    finally:
        scene.close()


def settle(lab: Lab) -> None:
    """After a failure nothing unfinished may be in the next test's way."""
    unfinished = livemove(lab, "status", "--json").report["unfinished"]
    for migration in {record["id"] for record in unfinished}:
        livemove(lab, "recover", migration, "--json")


def remembers_everything(scene: Scene, host: str) -> None:
    scene.unharmed(host)
    checked = scene.clients[0].check_memory()
    assert checked["pages"] > 0
    assert checked["wrong_pages"] == 0, scene.wrong_pages()


def move(scene: Scene, to: str, *options: str) -> Said:
    scene.begin_hop()
    said = migrate(scene.lab, scene.workload.name, to, *options)
    assert (said.status, said.report["outcome"]) == (0, "moved"), said.stderr
    remembers_everything(scene, to)
    return said


def the_pid(host: Host, scene: Scene) -> int:
    (pid,) = listening_pids(host, scene.workload)
    return int(pid)


@pytest.mark.parametrize("name", ["counter", "echo"])
def test_memory_of_every_kind_in_every_mode(lab: Lab, name: str) -> None:
    """Private, shared, of a memfd, of a file, forked, growing and shrinking; children come and go in every round."""
    with scene_of(lab, name, 24, 3, ALL_KINDS) as scene:
        for mode, to in zip(MODES, ("beta", "alpha") * 2, strict=True):
            said = move(scene, to, "--mode", mode)
            assert said.report["mode"] == mode
            assert (said.report["rounds"] != []) == (mode in ("pre-copy", "hybrid"))


@pytest.mark.parametrize("name", ["counter", "echo"])
def test_shared_memory_is_sent_before_the_freeze(lab: Lab, name: str) -> None:
    """Anonymous as it was made, and as CRIU has restored it, again and again; of a container and a process tree."""
    with scene_of(lab, name, 64, 3, SHARED) as scene:
        for to in ("beta", "alpha", "beta"):
            said = move(scene, to)
            assert said.report["bytes"]["frozen"] < 16 * MEBIBYTE
            assert said.report["bytes"]["pre_copy"] > 64 * MEBIBYTE
            assert "copied in the freeze" not in " ".join(said.report["warnings"])


def test_a_memfd_with_a_descriptor_is_sent_before_the_freeze(lab: Lab) -> None:
    """Although half of it is written past all page tables; mapping and descriptor are of the same memory afterwards."""
    with scene_of(lab, "counter", 64, 3, MEMFD) as scene:
        for to in ("beta", "alpha", "beta"):
            said = move(scene, to)
            assert said.report["bytes"]["frozen"] < 16 * MEBIBYTE
            assert said.report["bytes"]["pre_copy"] > 64 * MEBIBYTE
            assert "copied in the freeze" not in " ".join(said.report["warnings"])


def test_a_system_v_segment_is_sent_before_the_freeze(lab: Lab) -> None:
    """If nobody comes while it is copied; and not what was there before a visit, if somebody does."""
    with scene_of(lab, "counter", 64, 1, SEGMENTS) as scene:
        until(lambda: time.time() - last_visit(scene) > 4, "a while without a visit")
        sent = move(scene, "beta").report["bytes"]
        assert sent["frozen"] < 60 * MEBIBYTE < sent["pre_copy"]  # the segment has as many
        # Its memory has been checked, and from then on there are visits, some in every move.
        move(scene, "alpha")


def last_visit(scene: Scene) -> int:
    """When the segment was last attached or detached, in seconds of the clock: proc(5), /proc/sysvipc/shm."""
    host = scene.lab.host(workloads.where(scene.lab, scene.workload)[0])
    pid = str(min(map(int, listening_pids(host, scene.workload))))  # a child that has just been born has it too
    _, row = host.run(["nsenter", "--ipc", "--target", pid, "cat", "/proc/sysvipc/shm"]).stdout.splitlines()
    return max(map(int, row.split()[11:13]))


def test_not_much_more_is_sent_than_there_is(lab: Lab) -> None:
    with scene_of(lab, "counter", 128, 10) as scene:
        alpha = lab.host("alpha")
        status = alpha.read_file(f"/proc/{the_pid(alpha, scene)}/status")
        used = 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
        sent = move(scene, "beta").report["bytes"]
        assert 128 * MEBIBYTE < sent["pre_copy"] + sent["frozen"] <= 1.2 * used


@pytest.mark.parametrize(("give_up", "mode"), [("freeze", "pre-copy"), ("post-copy", "hybrid")])
def test_writes_faster_than_the_link_and_a_move_all_the_same(lab: Lab, give_up: str, mode: str) -> None:
    with scene_of(lab, "counter", 16, 100_000) as scene:
        said = move(scene, "beta", "--max-freeze", "1", "--give-up", give_up)
        assert said.report["mode"] == mode
        assert any(f"the policy says {give_up}" in warning for warning in said.report["warnings"])


def test_writes_faster_than_the_link_and_no_move(lab: Lab) -> None:
    with scene_of(lab, "counter", 16, 100_000) as scene:
        scene.begin_hop()
        said = migrate(lab, "counter", "beta", "--max-freeze", "1", "--give-up", "abort")
        check_stayed(said, scene, "NOT_CONVERGING")


def check_stayed(said: Said, scene: Scene, code: str) -> None:
    assert (said.status, said.report["outcome"], said.code) == (4, "rolled_back", code), said.stderr
    assert said.report["error"]["hint"]
    remembers_everything(scene, "alpha")


def test_a_process_that_somebody_else_traces(lab: Lab) -> None:
    with scene_of(lab, "counter", 4, 1) as scene:
        alpha = lab.host("alpha")
        pid = the_pid(alpha, scene)
        scene.begin_hop()
        with traced(alpha, pid):
            said = migrate(lab, "counter", "beta")
        check_stayed(said, scene, "TRACKING_FAILED")
        assert "traced" in said.report["error"]["message"]


def test_no_memory_is_left_for_the_pages_of_a_round(lab: Lab) -> None:
    with scene_of(lab, "counter", 64, 1) as scene:
        scene.begin_hop()
        with largest_file(lab.host("beta"), 32 * MEBIBYTE):
            said = migrate(lab, "counter", "beta")
        check_stayed(said, scene, "NOT_ENOUGH_SPACE")


def test_the_destination_agent_is_killed_in_a_round(lab: Lab) -> None:
    with scene_of(lab, "counter", 128, 1) as scene:
        beta = lab.host("beta")
        scene.begin_hop()
        with Livemove(lab, "migrate", "counter", "--to", "beta", "--json") as command:
            command.said("beta: copying")
            signal_agent(beta, "STOP")
            assert last_phase(beta, "destination") == "COPYING"
            kill_agent(beta)
            said = command.finish()
        check_stayed(said, scene, "AGENT_LOST")


@contextmanager
def filling(lab: Lab, mode: str) -> Iterator[tuple[Scene, Livemove, int]]:
    """A service whose memory is being filled in on beta: the filler stands still. Yields its pid too."""
    with (
        scene_of(lab, "counter", 256, 1) as scene,
        filling_stopped(lab.host("beta")) as stopped,
        Livemove(lab, "migrate", "counter", "--to", "beta", "--mode", mode, "--json") as command,
    ):
        scene.begin_hop()
        filler = stopped(command)
        assert last_phase(lab.host("beta"), "destination") == "RESUMED"
        yield scene, command, filler


def go_on(lab: Lab, filler: int) -> None:
    lab.host("beta").run(["kill", "-CONT", str(filler)])


def check_lost(lab: Lab, said: Said, scene: Scene) -> None:
    """Down rather than wrong, and said so. Started afresh over there, it can be recovered, and nothing is left (I5)."""
    assert (said.status, said.code) == (6, "MEMORY_LOST"), said.stderr
    until(lambda: workloads.where(lab, scene.workload) == [], "the end of the service")
    status = livemove(lab, "status", "--json").report
    assert {each["name"]: each["running_on"] for each in status["workloads"]}["counter"] == []
    assert {each["id"] for each in status["unfinished"]} == {said.report["id"]}
    for clients in scene.clients:
        clients.close()
    workloads.stop(lab, scene.workload)
    workloads.start(lab, scene.workload, "beta")
    recovered = livemove(lab, "recover", said.report["id"], "--json")
    assert recovered.status == 0, recovered.stderr
    until(lambda: left_over(lab, scene.workload, "beta") == [], lambda: left_over(lab, scene.workload, "beta"))


def test_the_filler_is_killed_while_memory_is_filled_in(lab: Lab) -> None:
    with filling(lab, "pre-copy") as (scene, command, filler):
        lab.host("beta").run(["kill", "-KILL", str(filler)])
        check_lost(lab, command.finish(), scene)


def test_the_destination_agent_is_killed_while_memory_is_filled_in(lab: Lab) -> None:
    """All pages are there: filler and guard do without the agent."""
    with filling(lab, "pre-copy") as (scene, command, filler):
        kill_agent(lab.host("beta"))
        go_on(lab, filler)
        said = command.finish()
        assert (said.status, said.report["outcome"]) == (0, "moved"), said.stderr
        remembers_everything(scene, "beta")
        until(lambda: left_over(lab, scene.workload, "beta") == [], lambda: left_over(lab, scene.workload, "beta"))


def test_the_destination_agent_is_killed_while_it_fetches_pages(lab: Lab) -> None:
    with filling(lab, "post-copy") as (scene, command, _):
        kill_agent(lab.host("beta"))
        check_lost(lab, command.finish(), scene)


def test_the_source_agent_is_killed_while_the_destination_has_all_pages(lab: Lab) -> None:
    with filling(lab, "pre-copy") as (scene, command, filler):
        kill_agent(lab.host("alpha"))
        go_on(lab, filler)
        said = command.finish()
        assert (said.status, said.report["outcome"]) == (0, "moved"), said.stderr
        remembers_everything(scene, "beta")


def test_the_source_agent_is_killed_while_it_still_has_pages(lab: Lab) -> None:
    with filling(lab, "post-copy") as (scene, command, filler):
        kill_agent(lab.host("alpha"))
        go_on(lab, filler)
        check_lost(lab, command.finish(), scene)


def test_sessions_and_coordinator_go_while_memory_is_filled_in(lab: Lab) -> None:
    with filling(lab, "pre-copy") as (scene, command, filler):
        drop_session(lab.host("beta"))
        command.signal(SIGKILL)
        assert command.finish().status == -SIGKILL
        go_on(lab, filler)
        until(lambda: last_phase(lab.host("beta"), "destination") == "RELEASED", "the end of the move")
        until(lambda: not agents(lab.host("beta")), "the end of the agent on beta")
        remembers_everything(scene, "beta")
