"""Trouble that is found before anything changes: exit status 2 or 3, one clear message, the service never noticed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

from labs.lab import Lab
from labs.topology import INTERFACE
from tests.integration.command import MIGRATION_FIELDS, Livemove, Said, migrate
from tests.integration.faults import failing_criu, held_criu, mounted_over, moved_away, refusing_ssh
from tests.integration.scene import Scene, journals
from tests.integration.stage import Stage

SERVICE = "counter"


@pytest.fixture(scope="module")
def stage(lab: Lab) -> Iterator[Stage]:
    with Stage(lab, SERVICE) as stage:
        yield stage


@pytest.fixture
def scene(stage: Stage) -> Iterator[Scene]:
    with stage.scene() as scene:
        yield scene


def check_refused(said: Said, status: int, code: str, words: str) -> None:
    """One message, on both streams, with its code."""
    assert said.status == status, said.stderr
    assert said.code == code
    assert words in said.report["error"]["message"]
    assert said.report["error"]["hint"]
    assert said.report["exit_code"] == status
    if status == 3:
        assert set(said.report) == MIGRATION_FIELDS
        assert said.report["outcome"] == "refused"
    assert said.stderr.count(code) == 1, said.stderr
    assert "Traceback" not in said.stderr


@pytest.mark.parametrize(
    ("workload", "to", "code"), [("cuonter", "beta", "UNKNOWN_WORKLOAD"), (SERVICE, "betta", "UNKNOWN_HOST")]
)
def test_an_unknown_name(lab: Lab, scene: Scene, workload: str, to: str, code: str) -> None:
    said = migrate(lab, workload, to)
    check_refused(said, 2, code, f"did you mean {(SERVICE if code == 'UNKNOWN_WORKLOAD' else 'beta')!r}")
    scene.unharmed("alpha")


@contextmanager
def address_on_gamma(lab: Lab) -> Iterator[None]:
    gamma = lab.host("gamma")
    gamma.run(["ip", "address", "add", "192.0.2.200/24", "dev", INTERFACE])
    try:
        yield
    finally:
        gamma.run(["ip", "address", "del", "192.0.2.200/24", "dev", INTERFACE])


@contextmanager
def little_memory(lab: Lab) -> Iterator[None]:
    beta = lab.host("beta")
    beta.write_file("/run/meminfo", "MemTotal: 65536 kB\nMemFree: 40000 kB\nMemAvailable: 40000 kB\n")
    with mounted_over(beta, "/run/meminfo", "/proc/meminfo"):
        yield
    beta.run(["rm", "/run/meminfo"])


def trouble(lab: Lab, code: str) -> AbstractContextManager[None]:
    """The state of beta (or gamma) that is to be refused with that code."""
    beta = lab.host("beta")
    return {
        "HOST_UNREACHABLE": lambda: refusing_ssh(beta),
        "CRIU_MISSING": lambda: mounted_over(beta, "/dev/null", "/usr/sbin/criu"),
        "SELF_TEST_FAILED": lambda: failing_criu(beta, "restore"),
        "BUNDLE_MISSING": lambda: moved_away(beta, "/srv/counter/config.json"),
        "ADDRESS_ANSWERED_BY_OTHER": lambda: address_on_gamma(lab),
        "NOT_ENOUGH_SPACE": lambda: little_memory(lab),
    }[code]()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("HOST_UNREACHABLE", "beta (192.0.2.12 port 22)"),
        ("CRIU_MISSING", "beta: no criu in the PATH"),
        ("SELF_TEST_FAILED", "no restore today"),
        ("BUNDLE_MISSING", "/srv/counter/config.json does not exist"),
        ("ADDRESS_ANSWERED_BY_OTHER", "02:00:5e:00:53:0d answers for 192.0.2.200"),
        ("NOT_ENOUGH_SPACE", "39 MiB are available"),
    ],
)
def test_a_host_that_cannot_take_part(lab: Lab, scene: Scene, code: str, words: str) -> None:
    before = journals(lab, "alpha"), journals(lab, "beta")
    with trouble(lab, code):
        said = migrate(lab, SERVICE, "beta")
    check_refused(said, 3, code, words)
    scene.unharmed("alpha")
    assert (journals(lab, "alpha"), journals(lab, "beta")) == before


def test_a_wrong_host_key(lab: Lab, scene: Scene, tmp_path: Path) -> None:
    keys = {line.split(",")[0]: line.split(" ", 1)[1] for line in lab.paths.known_hosts.read_text().splitlines()}
    known = lab.paths.known_hosts.read_text().replace(keys["beta"], keys["gamma"])
    (tmp_path / "known_hosts").write_text(known)
    config = tmp_path / "livemove.toml"
    config.write_text(lab.config_path.read_text().replace(str(lab.paths.known_hosts), str(tmp_path / "known_hosts")))
    said = migrate(lab, SERVICE, "beta", config=config)
    check_refused(said, 3, "HOST_KEY_MISMATCH", "beta (192.0.2.12 port 22)")
    scene.unharmed("alpha")


def test_a_container_that_does_not_run(lab: Lab, scene: Scene, tmp_path: Path) -> None:
    config = tmp_path / "livemove.toml"
    text = lab.config_path.read_text()
    config.write_text(text.replace(f'container = "{SERVICE}"', 'container = "stopped"'))
    alpha = lab.host("alpha")
    with ExitStack() as undo:
        spec = json.loads(alpha.read_file("/srv/counter/config.json"))
        spec["process"]["args"] = ["true"]
        spec["linux"]["cgroupsPath"] = "/stopped"
        spec["root"]["path"] = "/srv/counter/rootfs"
        alpha.write_file("/srv/stopped/config.json", json.dumps(spec))
        undo.callback(alpha.run, ["rm", "-r", "/srv/stopped"])
        alpha.run(["sh", "-c", "runc run --detach --bundle /srv/stopped stopped </dev/null >/dev/null 2>&1"])
        undo.callback(alpha.run, ["runc", "delete", "--force", "stopped"])
        said = migrate(lab, SERVICE, "beta", config=config)
    check_refused(said, 3, "WORKLOAD_NOT_RUNNING", "is there on alpha, and not running")
    scene.unharmed("alpha")


def test_the_destination_is_the_source(lab: Lab, scene: Scene) -> None:
    check_refused(migrate(lab, SERVICE, "alpha"), 3, "SAME_HOST", "runs on alpha already")
    scene.unharmed("alpha")


def test_a_move_during_a_move(lab: Lab, scene: Scene) -> None:
    with (
        held_criu(lab.host("beta")) as hold,
        Livemove(lab, "migrate", SERVICE, "--to", "beta", "--json") as first,
    ):
        hold.reached(first)
        second = migrate(lab, SERVICE, "gamma")
        hold.go()
        moved = first.finish()
    assert moved.status == 0, moved.stderr
    check_refused(second, 3, "WORKLOAD_BUSY", f"migration {moved.report['id']}")
    scene.unharmed("beta")


def test_two_moves_that_begin_together(lab: Lab, scene: Scene) -> None:
    """Both may look at the hosts before either has begun: the journals decide then."""
    with ThreadPoolExecutor() as both:
        moves = list(both.map(lambda to: (to, migrate(lab, SERVICE, to)), ("beta", "gamma")))
    moved = [to for to, said in moves if said.status == 0]
    refused = [said for _, said in moves if said.status != 0]
    assert len(moved) <= 1
    assert {said.status for said in refused} == {3}, [said.stderr for said in refused]
    assert {said.code for said in refused} <= {"WORKLOAD_BUSY"}
    scene.unharmed(moved[0] if moved else "alpha")
