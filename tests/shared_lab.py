"""Running labs that tests share, under names of this checkout's own."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from labs.lab import Lab, down
from labs.state import Paths

TESTS = Path(__file__).parent


def lab_name(role: str) -> str:
    """A name of this checkout's own, so that its tests meet neither a user's lab nor another checkout's tests."""
    return f"{role}-{hashlib.sha256(str(TESTS).encode()).hexdigest()[:6]}"


@contextmanager
def running_lab(role: str, packages: str = "base") -> Iterator[Lab]:
    """A lab for many tests, with a set of packages of ``labs.root``, up for the length of a `with` block."""
    _have_this_checkout()
    down(Paths(lab_name(role)))  # what a run that was killed has left, with its unfinished migrations
    running = Lab.up(lab_name(role), packages=packages)
    try:
        yield running
    finally:
        running.down()


@functools.cache
def _have_this_checkout() -> None:
    """Of two test runs in one checkout, the second waits here for the end of the first."""
    fcntl.flock(os.open(TESTS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), fcntl.LOCK_EX)
