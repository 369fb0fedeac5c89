"""Real moves under load: both runtimes, there and back on the same connections, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from labs import config
from labs.lab import Lab
from tests.integration.command import MIGRATION_FIELDS, Livemove, Said, migrate
from tests.integration.faults import agents, held_criu
from tests.integration.scene import CONNECTIONS, Scene, journals

PHASES = ["PREPARED", "COPYING", "DIVERTED", "FROZEN", "DUMPED", "STAGED", "COMMITTED", "RESUMED", "RELEASED"]
MEMORY_LIMIT_KIB = 100_000_000 / 1024
TWO_ADDRESSES = ("192.0.2.212/24", "2001:db8::212/64")


@contextmanager
def scene_of(lab: Lab, name: str, *, memory_mb: int = 0, dirty_mb_s: float = 0.0) -> Iterator[Scene]:
    scene = Scene.start(lab, name, memory_mb=memory_mb, dirty_mb_s=dirty_mb_s)
    try:
        yield scene
    finally:
        scene.close()


def check_moved(said: Said, workload: str, source: str, destination: str, mode: str = "pre-copy") -> None:
    report = said.report
    assert said.status == 0, said.stderr
    assert set(report) == MIGRATION_FIELDS
    assert (report["outcome"], report["exit_code"], report["error"]) == ("moved", 0, None)
    assert (report["workload"], report["source"], report["destination"]) == (workload, source, destination)
    assert report["connections"] == {"established": CONNECTIONS, "restored": CONNECTIONS}
    assert report["mode"] == mode
    assert all(set(each) == {"n", "pages", "bytes", "ms"} for each in report["rounds"])
    assert report["bytes"]["pre_copy"] == sum(each["bytes"] for each in report["rounds"])
    assert (report["rounds"] == []) == (mode in ("stop-copy", "post-copy"))
    assert [phase["name"] for phase in report["phases"]] == PHASES
    assert all(set(phase) == {"name", "start_ms", "ms"} for phase in report["phases"])
    assert 0 < report["freeze_ms"] < report["total_ms"]
    assert report["bytes"]["frozen"] > 0


def move(scene: Scene, destination: str) -> Said:
    """Move under load, and see that everybody has what they had."""
    source = scene.host
    scene.begin_hop()
    said = migrate(scene.lab, scene.workload.name, destination)
    check_moved(said, scene.workload.name, source, destination)
    scene.unharmed(destination)
    migration = said.report["id"]
    assert f"/var/lib/livemove/{migration}/source.jsonl" in journals(scene.lab, source)
    assert f"/var/lib/livemove/{migration}/destination.jsonl" in journals(scene.lab, destination)
    return said


@pytest.mark.parametrize("name", ["counter", "echo"])
def test_three_times_there_and_back_on_the_same_connections(lab: Lab, name: str) -> None:
    with scene_of(lab, name, memory_mb=4, dirty_mb_s=1) as scene:
        for destination in ("beta", "alpha") * 3:
            said = move(scene, destination)
            assert said.peak_kib < MEMORY_LIMIT_KIB
        assert scene.clients[0].check_memory() == {"pages": 1024, "wrong_pages": 0}


def test_two_addresses_of_both_families_and_a_third_host(lab: Lab) -> None:
    lab.add_workload(config.Workload("both", "process", TWO_ADDRESSES, pid_file="/run/both.pid"))
    with scene_of(lab, "both") as scene:
        move(scene, "beta")
        move(scene, "gamma")


@pytest.mark.parametrize("mode", ["auto", "stop-copy"])
def test_64_mb_of_memory_arrive_and_livemove_itself_stays_small(lab: Lab, mode: str) -> None:
    with scene_of(lab, "counter", memory_mb=64, dirty_mb_s=10) as scene:
        scene.begin_hop()
        command = ("migrate", "counter", "--to", "beta", "--mode", mode, "--json")
        with held_criu(lab.host("beta")) as hold, Livemove(lab, *command) as move:
            hold.reached(move)
            peaks = {name: agent_peak_kib(lab, name) for name in ("alpha", "beta")}
            hold.go()
            said = move.finish()
        check_moved(said, "counter", "alpha", "beta", "stop-copy" if mode == "stop-copy" else "pre-copy")
        scene.unharmed("beta")
        assert scene.clients[0].check_memory() == {"pages": 64 * 256, "wrong_pages": 0}
        in_the_freeze = said.report["bytes"]["frozen"] > 64 << 20
        assert in_the_freeze == (mode == "stop-copy"), said.report
        assert 0 < said.peak_kib < MEMORY_LIMIT_KIB
        assert all(0 < peak < MEMORY_LIMIT_KIB for peak in peaks.values()), peaks


def agent_peak_kib(lab: Lab, name: str) -> int:
    """The most memory the agent on a host has had."""
    host = lab.host(name)
    (pid,) = agents(host)
    status = host.read_file(f"/proc/{pid}/status")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))
