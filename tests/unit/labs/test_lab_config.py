"""lab.toml: workloads come and go, and what else is in it stays."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from labs import config
from labs.commands import LabError
from labs.state import Paths

REDIS = config.Workload("redis", "runc", ("192.0.2.210/24",), container="redis", bundle="/srv/redis")
AS_PROCESS = config.Workload("redis", "process", ("192.0.2.210/24",), pid_file="/run/redis.pid")
OTHER = config.Workload("redis-2", "podman", ("192.0.2.211/24",), container="redis-2")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "lab.toml"
    monkeypatch.setattr(Paths, "config", made)
    config.write(Paths("any"))
    return made


def read(path: Path) -> Any:
    return tomllib.loads(path.read_text())


def test_a_workload_comes_once_and_goes(path: Path) -> None:
    before = read(path)
    for each in (REDIS, OTHER, REDIS):
        config.add_workload(path, each)
    assert read(path)["workloads"].keys() - before["workloads"].keys() == {"redis", "redis-2"}
    for _ in range(2):
        config.remove_workload(path, "redis")
    assert read(path)["workloads"].keys() - before["workloads"].keys() == {"redis-2"}
    config.remove_workload(path, "redis-2")
    assert read(path) == before


def test_one_that_says_something_else_comes_when_the_other_has_gone(path: Path) -> None:
    config.add_workload(path, REDIS)
    with pytest.raises(LabError, match="'redis' is there already"):
        config.add_workload(path, AS_PROCESS)
    config.remove_workload(path, "redis")
    config.add_workload(path, AS_PROCESS)
    assert read(path)["workloads"]["redis"] == {
        "runtime": "process", "addresses": ["192.0.2.210/24"], "pid_file": "/run/redis.pid",
    }  # fmt: skip
