"""A service moves with its files: every byte, owner, link and attribute of them; or it stays, and so do they."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT

import pytest

from labs import config, workloads
from labs.lab import Lab
from labs.machines import Host
from labs.programs.bookkeeper import STILL
from labs.workloads import CODE, Workload
from tests.integration.books import audited, look
from tests.integration.command import Livemove, Said, livemove, migrate
from tests.integration.faults import Hold, held_criu
from tests.integration.scene import Scene
from tests.integration.stage import Stage

NAME = "books"
DATA = f"/srv/{NAME}/data"
KEPT = f"{DATA}/{STILL}"


@pytest.fixture(scope="module")
def stage(lab: Lab) -> Iterator[Stage]:
    lab.add_workload(
        config.Workload(NAME, "runc", ("192.0.2.239/24",), container=NAME, bundle=f"/srv/{NAME}", files="sync")
    )
    with Stage(lab, NAME, program="bookkeeper") as stage:
        yield stage


@pytest.fixture
def scene(stage: Stage) -> Iterator[Scene]:
    with stage.scene() as scene:
        yield scene


def about_events(said: Said) -> list[str]:
    return [warning for warning in said.report["warnings"] if "events" in warning]


@contextmanager
def small(host: Host) -> Iterator[None]:
    """A file system of 256 KiB for the files."""
    host.run(["sh", "-c", f"mkdir -p {DATA} && mount -t tmpfs -o size=256k none {DATA}"])
    try:
        yield
    finally:
        host.run(["sh", "-c", f"umount {DATA} && rmdir {DATA}"])


def exists(host: Host, path: str) -> bool:
    return host.run(["test", "-e", path], check=False).returncode == 0


def check_stayed(scene: Scene, said: Said, status: int, code: str, words: str) -> None:
    assert (said.status, said.code) == (status, code), said.stderr
    assert words in said.stderr
    assert "Traceback" not in said.stderr
    scene.unharmed("alpha")
    audited(scene.lab.host("alpha"), DATA)


@contextmanager
def frozen(lab: Lab) -> Iterator[tuple[Livemove, Hold]]:
    """A move to beta that stands still when all files are there."""
    with held_criu(lab.host("beta")) as hold, Livemove(lab, "migrate", NAME, "--to", "beta", "--json") as move:
        hold.reached(move)
        yield move, hold


def test_a_move_that_is_given_up_leaves_the_files_where_they_were(lab: Lab, scene: Scene) -> None:
    alpha, beta = lab.host("alpha"), lab.host("beta")
    still = look(alpha, KEPT)
    with frozen(lab) as (move, hold):
        assert look(beta, KEPT) == still
        move.signal(SIGINT)
        hold.go()
        said = move.finish()
    check_stayed(scene, said, 130, "INTERRUPTED", "INTERRUPTED")
    assert look(alpha, KEPT) == still
    assert not exists(beta, DATA)


def test_somebody_else_writes_to_a_frozen_service_s_files(lab: Lab, scene: Scene) -> None:
    alpha = lab.host("alpha")
    with frozen(lab) as (move, hold):
        alpha.run(["touch", f"{KEPT}/plain"])
        hold.go()
        said = move.finish()
    check_stayed(scene, said, 4, "FILES_CHANGED", f"{KEPT}/plain was written to while the service was frozen")
    assert not exists(lab.host("beta"), DATA)


def test_what_is_somebody_else_s_on_the_destination_is_not_touched(lab: Lab, scene: Scene) -> None:
    beta = lab.host("beta")
    beta.write_file(f"{DATA}/log", "another service's\n")
    try:
        said = migrate(lab, NAME, "beta")
        check_stayed(scene, said, 3, "FILES_IN_THE_WAY", f"{DATA} exists, and what is in it")
        assert look(beta, DATA).keys() == {"'.'", "'log'"}
    finally:
        beta.run(["rm", "-r", DATA])


def test_a_destination_without_room(lab: Lab, scene: Scene) -> None:
    with small(lab.host("beta")):
        said = migrate(lab, NAME, "beta")
        check_stayed(scene, said, 3, "DISK_FULL", f"{DATA} needs ")


def test_there_and_back_with_everything(lab: Lab, scene: Scene) -> None:
    """To a host where there is nothing; and from its root, an overlay that tells of no changes, back to what was left
    there, where there is more by now."""
    alpha, beta = lab.host("alpha"), lab.host("beta")
    still, entries = look(alpha, KEPT), audited(alpha, DATA)
    said = migrate(lab, NAME, "beta")
    assert (said.status, about_events(said)) == (0, []), said.stderr
    scene.unharmed("beta")
    assert look(beta, KEPT) == still
    assert entries < (entries := audited(beta, DATA))
    alpha.run(["sh", "-c", f"rm {KEPT}/owned && echo more >{KEPT}/more && echo x >>{DATA}/log"])
    scene.begin_hop()
    said = migrate(lab, NAME, "alpha")
    (warning,) = about_events(said)
    assert "the last pass looks at every file" in warning
    scene.unharmed("alpha")
    assert look(alpha, KEPT) == still
    assert entries < audited(alpha, DATA)


def test_shared_and_present_directories_are_looked_at(lab: Lab, tmp_path: Path) -> None:
    workload = Workload.of_lab(lab, "echo")
    workloads.stop(lab, workload)
    workloads.install(lab, workload)
    workloads.start(lab, workload, "alpha")
    config_path = tmp_path / "lab.toml"

    def codes(**kinds: str) -> dict[str, str]:
        volumes = "".join(f'\n[[volumes]]\npath = "/srv/{name}"\nfiles = "{kind}"\n' for name, kind in kinds.items())
        volumes = volumes.replace("[[volumes]]", "[[workloads.echo.volumes]]")
        config_path.write_text(lab.config_path.read_text() + volumes)
        said = livemove(lab, "check", "echo", "--to", "beta", "--json", config=config_path)
        return {each["code"]: each["message"] for each in said.report["findings"] if "FILES" in each["code"]}

    lab.host("alpha").run(["mkdir", "-p", "/srv/alone", "/srv/mine"])
    lab.host("beta").run(["mkdir", "-p", "/srv/mine"])
    try:
        assert codes(shared="shared", pattern="present") == {}
        assert lab.host("beta").run(["find", "/srv/shared", "-name", ".livemove*"]).stdout == ""
        lab.host("beta").run(["touch", f"{CODE}/zzz"])
        found = codes(pattern="present", mine="shared", alone="present")
        assert found["FILES_DIFFER"] == f"{CODE} is not the source's: zzz is there alone"
        assert found.keys() == {"FILES_DIFFER", "FILES_NOT_SHARED", "FILES_MISSING"}
    finally:
        lab.host("beta").run(["rm", "-f", f"{CODE}/zzz"])
        workloads.stop(lab, workload)
