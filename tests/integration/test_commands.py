"""The commands beside `migrate`: what they say, that they change nothing, and that `--json` is always one object."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import ndiff
from pathlib import Path

import pytest

from labs.lab import Lab
from labs.topology import HOSTS, INTERFACE
from tests.integration.command import MIGRATION_FIELDS, livemove, migrate
from tests.integration.faults import mounted_over
from tests.integration.scene import Scene
from tests.integration.stage import Stage

SERVICE = "counter"
NAMES = [host.name for host in HOSTS]

#: Everything a read-only command could have changed, but for the agent's cache.
STATE = f"""\
find /var/lib/livemove /run/livemove 2>/dev/null
nft list ruleset
ip -o address show dev {INTERFACE} | grep -v fe80: | sed 's,valid_lft.*,,'
runc list --quiet
mount
"""


@pytest.fixture(scope="module")
def stage(lab: Lab) -> Iterator[Stage]:
    with Stage(lab, SERVICE) as stage:
        yield stage


@pytest.fixture
def scene(stage: Stage) -> Iterator[Scene]:
    with stage.scene() as scene:
        yield scene


def state(lab: Lab) -> list[str]:
    return [f"{name}: {line}" for name in NAMES for line in lab.host(name).run(["sh"], input=STATE).stdout.splitlines()]


@contextmanager
def unchanged(lab: Lab) -> Iterator[None]:
    before = state(lab)
    yield
    changes = [line for line in ndiff(before, state(lab)) if not line.startswith("  ")]
    assert changes == []


def test_doctor_finds_three_healthy_hosts(lab: Lab, scene: Scene) -> None:
    with unchanged(lab):
        said = livemove(lab, "doctor", "--json")
    assert said.status == 0, said.stdout
    hosts = said.report["hosts"]
    assert [host["name"] for host in hosts] == NAMES
    for host in hosts:
        assert host["self_test"]["ok"] is True
        assert [finding["code"] for finding in host["findings"] if finding["severity"] == "error"] == []
    scene.unharmed("alpha")


def test_doctor_of_a_host_without_criu(lab: Lab) -> None:
    with mounted_over(lab.host("gamma"), "/dev/null", "/usr/sbin/criu"), unchanged(lab):
        said = livemove(lab, "doctor", "gamma", "--json")
        spoken = livemove(lab, "doctor", "gamma")
    assert said.status == 3
    (host,) = said.report["hosts"]
    assert "CRIU_MISSING" in [finding["code"] for finding in host["findings"]]
    assert spoken.status == 3
    assert "CRIU_MISSING" in spoken.stdout


def test_check_of_a_move_that_would_work(lab: Lab, scene: Scene) -> None:
    with unchanged(lab):
        said = livemove(lab, "check", SERVICE, "--to", "gamma", "--json")
    assert said.status == 0, said.stdout
    assert (said.report["workload"], said.report["source"], said.report["destination"]) == (SERVICE, "alpha", "gamma")
    assert [finding for finding in said.report["findings"] if finding["severity"] == "error"] == []
    scene.unharmed("alpha")


def test_check_names_every_reason(lab: Lab, scene: Scene) -> None:
    beta = lab.host("beta")
    beta.run(["mv", "/srv/counter/config.json", "/srv/counter/away"])
    try:
        with mounted_over(beta, "/dev/null", "/usr/sbin/criu"), unchanged(lab):
            said = livemove(lab, "check", SERVICE, "--to", "beta", "--json")
    finally:
        beta.run(["mv", "/srv/counter/away", "/srv/counter/config.json"])
    assert said.status == 3
    findings = {finding["code"]: finding for finding in said.report["findings"]}
    assert {"CRIU_MISSING", "BUNDLE_MISSING"} <= findings.keys()
    assert all(finding["message"] and finding["hint"] for finding in findings.values())
    scene.unharmed("alpha")


def test_a_dry_run_changes_nothing(lab: Lab, scene: Scene) -> None:
    with unchanged(lab):
        said = migrate(lab, SERVICE, "beta", "--dry-run")
    assert said.status == 0, said.stderr
    assert set(said.report) == MIGRATION_FIELDS
    assert (said.report["outcome"], said.report["error"]) == ("planned", None)
    scene.unharmed("alpha")


def test_status_says_where_everything_runs(lab: Lab, scene: Scene) -> None:
    with unchanged(lab):
        said = livemove(lab, "status", "--json")
    assert said.status == 0, said.stdout
    assert {each["name"]: each["running_on"] for each in said.report["workloads"]}[SERVICE] == ["alpha"]
    assert said.report["unfinished"] == []
    assert said.report["unreachable"] == {}
    scene.unharmed("alpha")


def test_recover_of_an_unknown_migration(lab: Lab) -> None:
    with unchanged(lab):
        said = livemove(lab, "recover", "20261120T000000-counter-0000", "--json")
    assert (said.status, said.code) == (2, "UNKNOWN_MIGRATION")
    assert "20261120T000000-counter-0000" in said.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("migrate", SERVICE, "--json"),
        ("migrate", "--to", "beta", "--json"),
        ("migrate", "nobody", "--to", "beta", "--json"),
        ("check", SERVICE, "--to", "nowhere", "--json"),
        ("doctor", "nowhere", "--json"),
        ("recover", "--json"),
        ("status", "--colour", "--json"),
        ("fly", "--json"),
    ],
)
def test_usage_errors_are_one_object_too(lab: Lab, arguments: tuple[str, ...]) -> None:
    said = livemove(lab, *arguments)
    assert said.status == 2
    assert said.report["exit_code"] == 2
    assert said.code in ("USAGE", "UNKNOWN_HOST", "UNKNOWN_WORKLOAD")
    assert said.report["error"]["message"]
    assert said.stderr


def test_a_broken_configuration_is_told_with_file_and_key(lab: Lab, tmp_path: Path) -> None:
    config = tmp_path / "livemove.toml"
    config.write_text(lab.config_path.read_text().replace("interface =", "interfaec ="))
    said = livemove(lab, "status", "--json", config=config)
    assert (said.status, said.code) == (2, "CONFIG")
    assert str(config) in said.report["error"]["message"]
    assert "interfaec" in said.report["error"]["message"]
