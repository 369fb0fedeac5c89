"""Thousands of moves on fakes, each with two journals: no disk for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fsync is for, the order of records, is seen to in test_journal.py; here it would be hours of disk time."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory, and gone with the test: on a disk, making and removing the directories is a third of all the work."""
    with TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)
