"""The labs that the integration tests share: up once, down at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from labs.lab import Lab, down
from labs.state import Paths
from tests.shared_lab import lab_name, running_lab


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """A running lab."""
    with running_lab("tests") as running:
        yield running


@pytest.fixture(scope="module")
def packaged_lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A running lab with the packages that the module names: PACKAGES = "runtimes"."""
    with running_lab("extra", request.module.PACKAGES) as running:
        yield running


@pytest.fixture
def other_lab_name() -> Iterator[str]:
    """The name of a lab that a test brings up and down itself; whatever it leaves is removed."""
    name = lab_name("other")
    yield name
    down(Paths(name))
