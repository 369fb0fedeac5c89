"""labs/services: what it prints, and that its exit status says whether anything was lost or wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from click.testing import CliRunner, Result

from labs import limits, services, workloads
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


def refused(tour: Tour, service: Service, outcome: Outcome) -> None:
    outcome.refused, outcome.connections = "IO_URING", 13


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


def test_one_that_livemove_refuses_as_it_should_is_told(run: Callable[..., Result]) -> None:
    done = run(refused, "node", "--runtime", "process")
    assert done.exit_code == 0
    assert "not moved: IO_URING" in " ".join(done.stdout.split())
    (told,) = json.loads(run(refused, "node", "--runtime", "process", "--json").stdout)["services"]
    assert (told["refused"], told["hops"], told.keys() - FIELDS) == ("IO_URING", 0, {"refused"})


REFUSED = {"outcome": "refused", "exit_code": 3, "error": {"code": "IO_URING"}}
OTHERWISE = {"outcome": "refused", "exit_code": 3, "error": {"code": "TERMINAL"}}
MOVED = {"outcome": "moved", "exit_code": 0, "freeze_ms": 80.0}


@pytest.mark.parametrize(
    ("runtime", "report", "hops", "refused", "problem"),
    [
        ("process", REFUSED, 0, "IO_URING", ""),
        ("process", OTHERWISE, 0, "", "move to beta: IO_URING was due: refused"),
        ("process", MOVED, 0, "", "move to beta: IO_URING was due: moved"),
        ("podman", REFUSED, 0, "", "move to beta: refused: {'code': 'IO_URING'}"),
        ("podman", MOVED, 1, "", ""),
    ],
)
def test_a_refusal_has_to_be_the_one_that_the_catalogue_names(
    monkeypatch: pytest.MonkeyPatch, *, runtime: Any, report: dict[str, Any], hops: int, refused: str, problem: str
) -> None:
    seen = {"connections": 13, "lost": 0, "wrong": 0, "longest_gap_ms": 5.0, "troubles": []}
    clients = mock.MagicMock()
    clients.__enter__.return_value = mock.Mock(**{"end_hop.return_value": seen, "stop.return_value": seen})
    done = {"house": mock.Mock(), "start": None, "memory_mb": 80.0, "ServiceClients": clients, "migrate": report}
    for name, answer in done.items():
        monkeypatch.setattr(services, name, mock.Mock(return_value=answer))
    monkeypatch.setattr(workloads, "where", lambda *_: ["beta"])
    monkeypatch.setattr(time, "sleep", lambda _: None)
    outcome = Outcome("node", runtime, "")
    Tour(mock.Mock(), 1, keep=True, steps=mock.MagicMock()).take(SERVICES["node"], outcome)
    assert (outcome.hops, outcome.refused) == (hops, refused)
    assert [each[: len(problem)] for each in outcome.problems] == ([problem] if problem else [])


def test_a_lab_that_fails_and_a_service_that_is_not_there(run: Callable[..., Result]) -> None:
    assert run(never, "redis").exit_code == 1
    assert run(well, "oracle").exit_code == 2
