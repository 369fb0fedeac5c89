"""labs/services: what it prints, and that its exit status says whether anything was lost or wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from click.testing import CliRunner, Result

from labs import limits, services
from labs.catalogue import SERVICES
from labs.catalogue.base import Service
from labs.commands import LabError
from labs.services import Outcome, Tour

FIELDS = {
    "name", "runtime", "memory_mb", "connections", "hops", "freeze_ms", "longest_gap_ms", "lost", "wrong", "needed",
}  # fmt: skip
Take = Callable[[Tour, Service, Outcome], None]


def well(tour: Tour, service: Service, outcome: Outcome) -> None:
    outcome.hops, outcome.connections, outcome.freeze_ms, outcome.longest_gap_ms = tour.hops, 12, 61.5, 80.0


def wrongly(tour: Tour, service: Service, outcome: Outcome) -> None:
    well(tour, service, outcome)
    if service.name == "nginx":
        outcome.wrong = 1
        outcome.problems.append("move to beta: Reader 0: status: 500 where 200 was due")


def never(tour: Tour, service: Service, outcome: Outcome) -> None:
    raise LabError(f"alpha: {service.name} does not listen")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    @contextmanager
    def no_lab(*_: Any, **__: Any) -> Iterator[None]:
        yield

    for name in ("only_one", "lab_for_a_while"):
        monkeypatch.setattr(services, name, no_lab)
    monkeypatch.setattr(limits, "work_around", lambda _: "")

    def run_with(take: Take, *arguments: str) -> Result:
        monkeypatch.setattr(Tour, "take", take)
        return CliRunner().invoke(services.cli, arguments)

    return run_with


def test_all_services_one_object(run: Callable[..., Result]) -> None:
    done = run(well, "--json", "--hops", "2")
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert [each["name"] for each in told["services"]] == list(SERVICES)
    assert all(each.keys() == FIELDS and each["hops"] == 2 for each in told["services"])


def test_named_services_as_a_table(run: Callable[..., Result]) -> None:
    done = run(well, "nginx", "redis")
    assert done.exit_code == 0
    assert done.stdout.index("nginx") < done.stdout.index("redis")
    assert "postgresql" not in done.stdout


def test_one_that_went_wrong_is_told_and_the_others_go_on(run: Callable[..., Result]) -> None:
    done = run(wrongly, "nginx", "redis", "--json")
    assert done.exit_code == 1
    nginx, redis = json.loads(done.stdout)["services"]
    assert (nginx["wrong"], nginx["problems"]) == (1, ["move to beta: Reader 0: status: 500 where 200 was due"])
    assert redis.keys() == FIELDS
    assert "nginx: move to beta: Reader 0: status: 500 where 200 was due" in " ".join(done.stderr.split())


def test_a_lab_that_fails_and_a_service_that_is_not_there(run: Callable[..., Result]) -> None:
    assert run(never, "redis").exit_code == 1
    assert run(well, "oracle").exit_code == 2
