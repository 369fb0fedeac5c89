"""The lab that the integration tests share: up once, down at the end."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from labs.lab import Lab, down
from labs.state import Paths

TESTS = Path(__file__).parent


def lab_name(role: str) -> str:
    """A name of this checkout's own, so that its tests meet neither a user's lab nor another checkout's tests."""
    return f"{role}-{hashlib.sha256(str(TESTS).encode()).hexdigest()[:6]}"


@pytest.fixture(scope="session")
def checkout() -> Iterator[None]:
    """Of two test runs in one checkout, the second waits here for the first to end."""
    lock = os.open(TESTS, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextmanager
def running_lab(role: str, packages: str) -> Iterator[Lab]:
    """A lab for many tests, up for the length of a `with` block."""
    down(Paths(lab_name(role)))  # what a run that was killed has left, with its unfinished migrations
    running = Lab.up(lab_name(role), packages=packages)
    try:
        yield running
    finally:
        running.down()


@pytest.fixture(scope="session")
def lab(checkout: None) -> Iterator[Lab]:
    """A running lab."""
    with running_lab("tests", "base") as running:
        yield running


@pytest.fixture(scope="module")
def packaged_lab(checkout: None, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A running lab with the packages that the module names: PACKAGES = "runtimes"."""
    with running_lab("extra", request.module.PACKAGES) as running:
        yield running


@pytest.fixture
def other_lab_name() -> Iterator[str]:
    """The name of a lab that a test brings up and down itself; whatever it leaves is removed."""
    name = lab_name("other")
    yield name
    down(Paths(name))
