"""Which packages a lab's root has, and under which name it is cached."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from labs import root
from labs.commands import LabError


def included(packages: str) -> set[str]:
    (option,) = (each for each in root.options(packages) if each.startswith("--include="))
    return set(option.removeprefix("--include=").split(","))


@pytest.mark.parametrize("packages", root.EXTRAS)
def test_every_set_has_the_packages_of_every_lab(packages: str) -> None:
    assert included(packages) == {*root.PACKAGES, *root.EXTRAS[packages]}


def test_every_set_has_a_root_of_its_own() -> None:
    assert len({root.cached_root(packages) for packages in root.EXTRAS}) == len(root.EXTRAS)


def test_a_set_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(LabError, match=r"no set of packages 'bose'; there are: base, "):
        root.cached_root("bose")


def test_building_removes_old_roots_of_other_recipes_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root, "CACHE", tmp_path)
    monkeypatch.setattr(root, "run", lambda argv, **_: Path(argv[-2]).mkdir())
    monkeypatch.setattr(root, "mirror", lambda: "mirror")
    others = tmp_path / "root-0123456789ab", tmp_path / "root-cdef01234567"
    for other in others:
        other.mkdir()
    assert root.ensure("base") == root.cached_root("base")
    assert all(other.is_dir() for other in others)
    now = time.time() + root.OBSOLETE_S + 60
    monkeypatch.setattr(time, "time", lambda: now)
    assert root.ensure("runtimes").is_dir()
    assert sorted(tmp_path.iterdir()) == sorted(map(root.cached_root, ("base", "runtimes")))
