"""A representative third of labs/services: real services move there and back, and their clients find nothing wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from labs import housing, limits, workloads
from labs.catalogue import SERVICES
from labs.lab import Lab
from labs.services import Outcome, Tour
from labs.steps import Steps
from tests.integration.command import livemove

PACKAGES = "services"


@pytest.fixture(scope="module")
def services_lab(packaged_lab: Lab) -> Lab:
    limits.work_around(packaged_lab)
    return packaged_lab


@pytest.mark.parametrize(
    ("name", "runtime", "hops"),
    [("redis", "runc", 2), ("nginx", "runc", 2), ("postgresql", "runc", 2), ("redis", "podman", 1)],
)
def test_a_service_moves_there_and_back(services_lab: Lab, name: str, runtime: housing.Runtime, hops: int) -> None:
    said = StringIO()
    outcome = Outcome(name, runtime, SERVICES[name].needed)
    Tour(services_lab, hops=hops, keep=False, steps=Steps(Console(file=said))).take(SERVICES[name], outcome)
    assert outcome.problems == [], said.getvalue()
    assert (outcome.hops, outcome.lost, outcome.wrong) == (hops, 0, 0)
    assert outcome.connections >= 10
    assert outcome.freeze_ms > 0 and outcome.longest_gap_ms > 0 and outcome.memory_mb > 0
    told = json.loads(json.dumps(outcome.to_json()))
    assert list(told) == [
        "name", "runtime", "needed", "memory_mb", "connections", "hops", "freeze_ms", "longest_gap_ms", "lost", "wrong",
    ]  # fmt: skip


def without_ipc_namespace(config: dict[str, Any]) -> None:
    config["linux"]["namespaces"].remove({"type": "ipc"})


def with_output_to_the_host(config: dict[str, Any]) -> None:
    config["process"]["args"] = config["process"]["args"][len(housing.SAY_IN_FILE) + 1 :]


def with_io_uring(config: dict[str, Any]) -> None:
    del config["linux"]["seccomp"]


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("redis", with_output_to_the_host, "FILE_OUTSIDE"),
        ("postgresql", without_ipc_namespace, "SYSV_SHARED_WITH_HOST"),
        ("node", with_io_uring, "IO_URING"),
    ],
)
def test_check_finds_what_a_service_needs(
    services_lab: Lab, name: str, change: Callable[[dict[str, Any]], None], code: str
) -> None:
    service, alpha = SERVICES[name], services_lab.host("alpha")
    workload = housing.house(services_lab, service)
    path = f"{workload.bundle}/config.json"
    config = json.loads(alpha.read_file(path))
    change(config)
    alpha.write_file(path, json.dumps(config))
    try:
        housing.start(services_lab, service, workload, "alpha")
        said = livemove(services_lab, "check", name, "--to", "beta", "--json")
    finally:
        workloads.stop(services_lab, workload)
    assert said.status == 3
    assert code in {finding["code"] for finding in said.report["findings"] if finding["severity"] == "error"}
