"""A container's limits, as its config.json has them and as its control group has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.agent.control_group import changed_limits

RESOURCES = {
    "memory": {"limit": (1 << 30) + 5},
    "pids": {"limit": 500},
    "cpu": {"quota": 50_000, "period": 200_000},
    "hugepageLimits": [{"pageSize": "2MB", "limit": 8 << 20}],
}
IN_FORCE = {"memory.max": "1073741824", "pids.max": "500", "cpu.max": "50000 200000", "hugetlb.2MB.max": "8388608"}
NONE = {"memory.max": "max", "pids.max": "max", "cpu.max": "max 100000", "hugetlb.1GB.max": "9223372035781033984"}


def told(
    folder: Path, resources: dict[str, Any] | None, files: dict[str, str], path: str = "/counter", below: str = ""
) -> list[str]:
    """What is said of a container with these resources in its config.json, and these files in its group."""
    (folder / "config.json").write_text(json.dumps({"linux": {"cgroupsPath": path, "resources": resources}}))
    group = folder / "cgroup" / below / path.lstrip("/")
    group.mkdir(parents=True)
    (folder / "cgroup" / below / "cgroup.controllers").touch()
    for name, value in files.items():
        (group / name).write_text(f"{value}\n")
    return [each.message for each in changed_limits("runc", folder, "counter", folder / "cgroup")]


NO_HUGE_PAGES = {"hugepageLimits": [{"pageSize": "2MB", "limit": 0}]}


@pytest.mark.parametrize(
    ("resources", "files"),
    [
        (RESOURCES, IN_FORCE),
        ({}, NONE),
        (None, NONE),
        (RESOURCES, {}),
        (NO_HUGE_PAGES, NONE | {"hugetlb.2MB.max": "0"}),
    ],
)
def test_what_config_json_asks_for_is_in_force(
    tmp_path: Path, resources: dict[str, Any] | None, files: dict[str, str]
) -> None:
    assert told(tmp_path, resources, files) == []


@pytest.mark.parametrize("below", ["", "unified"])
@pytest.mark.parametrize(
    ("file", "value"), [("memory.max", "max"), ("pids.max", "600"), ("cpu.max", "max 200000"), ("hugetlb.2MB.max", "0")]
)
def test_what_was_changed_is_told(tmp_path: Path, file: str, value: str, below: str) -> None:
    (message,) = told(tmp_path, RESOURCES, IN_FORCE | {file: value}, below=below)
    assert message.endswith(f"config.json: {file} is {value}, not {IN_FORCE[file]}")


def test_also_what_config_json_says_nothing_of(tmp_path: Path) -> None:
    (message,) = told(tmp_path, {}, NONE | {"pids.max": "10"})
    assert message.endswith("pids.max is 10, not max")


def test_what_cannot_be_told_is_not(tmp_path: Path) -> None:
    assert told(tmp_path, RESOURCES, NONE, "system.slice:runc:counter") == []


def test_without_a_group_there_is_nothing_to_tell(tmp_path: Path) -> None:
    assert changed_limits("runc", tmp_path, "counter", tmp_path / "cgroup") == ()
