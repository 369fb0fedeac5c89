"""What a tree is on a host: its entries, its digest, whose it is, and probes in what is shared."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.agent.files.left_over import LeftOver
from coordinator.agent.files.looking import Probes, describe_tree, digest, listing, walk
from coordinator.facts import FilesKind, Tree, TreeFacts


def fill(root: Path) -> Path:
    (root / "a/b").mkdir(parents=True)
    (root / "a/b/file").write_bytes(b"content")
    (root / "a-file").write_bytes(b"")
    (root / "link").symlink_to("a/b")
    os.mkfifo(root / "pipe")
    os.utime(root / "a-file", (1, 1))
    return root


def described(path: Path, files: FilesKind, state: Path, nonce: str = "") -> TreeFacts:
    return describe_tree(Tree(path=str(path), inside="/", files=files), LeftOver(state, "w"), nonce)


def test_every_entry_once_and_parents_first(tmp_path: Path) -> None:
    assert [path for path, _ in walk(str(fill(tmp_path)))] == [".", "a", "a-file", "link", "pipe", "a/b", "a/b/file"]


def test_what_goes_away_during_a_walk_is_left_out(tmp_path: Path) -> None:
    root = fill(tmp_path)
    seen = []
    for path, _ in walk(str(root)):
        seen.append(path)
        if path == "a":
            shutil.rmtree(root / "a")
            (root / "a").write_text("no directory any more")
    assert seen == [".", "a", "a-file", "link", "pipe"]
    assert list(walk(str(root / "gone"))) == list(walk(str(root / "a-file/below"))) == []


CHANGES: dict[str, Callable[[Path], object]] = {
    "a/b/file": lambda root: (root / "a/b/file").write_bytes(b"Content"),
    "a-file": lambda root: (root / "a-file").chmod(0o600),
    "link": lambda root: (root / "link").rename(root / "a-file"),
    "new": lambda root: (root / "new").touch(),
    "pipe": lambda root: (root / "pipe").unlink(),
    "a": lambda root: os.setxattr(root / "a", "user.colour", b"green"),
}


@pytest.mark.parametrize("path", CHANGES)
def test_a_difference_is_one_of_the_digest_and_of_that_entry(path: str, tmp_path: Path) -> None:
    one, other = (fill(tmp_path / name) for name in ("one", "other"))
    os.utime(other / "a", (5, 5))
    assert digest(listing(str(one))) == digest(listing(str(other)))
    CHANGES[path](other)
    before, after = listing(str(one)), listing(str(other))
    assert digest(before) != digest(after)
    assert path in {name for name in before | after if before.get(name) != after.get(name)}


def test_what_is_to_be_copied_is_measured(tmp_path: Path) -> None:
    root = fill(tmp_path / "root")
    (root / "large").write_bytes(bytes(1 << 20))
    before = described(root, "sync", tmp_path)
    os.link(root / "large", root / "again")
    found = described(root, "sync", tmp_path)
    assert found.used_bytes == before.used_bytes >= 1 << 20
    assert (found.state, found.entries, found.left_over, found.problem) == ("filled", 8, False, "")
    assert found.free_bytes > 0 < found.free_entries
    absent = described(tmp_path / "x/y", "sync", tmp_path)
    assert (absent.state, absent.free_bytes > 0) == ("absent", True)
    (tmp_path / "empty").mkdir()
    assert described(tmp_path / "empty", "sync", tmp_path).state == "empty"
    assert "is not a directory" in described(root / "large", "sync", tmp_path).problem


def test_what_a_move_left_is_remembered_until_the_workload_is_back(tmp_path: Path) -> None:
    root = fill(tmp_path / "root")
    left_over = LeftOver(tmp_path / "state", "w")
    left_over.remember([root, tmp_path / "gone"])
    assert described(root, "sync", tmp_path / "state").left_over
    assert not LeftOver(tmp_path / "state", "other").is_ours(root)
    root.rename(tmp_path / "moved")
    fill(root)
    assert not described(root, "sync", tmp_path / "state").left_over  # another directory of that name
    left_over.remember([root])
    left_over.forget([root])
    assert not left_over.is_ours(root)
    assert not list((tmp_path / "state").rglob("*.json"))
    left_over.forget([root])


def test_a_probe_is_seen_where_it_is_and_goes_again(tmp_path: Path) -> None:
    shared, other = tmp_path / "shared", tmp_path / "other"
    shared.mkdir()
    other.mkdir()
    probes = Probes()
    trees = tuple(Tree(path=str(path), inside="/", files="shared") for path in (shared, tmp_path / "absent"))
    assert probes.offer(trees, "n1") == {}
    assert described(shared, "shared", tmp_path, "n1").probe_seen
    assert not described(shared, "shared", tmp_path, "n2").probe_seen
    assert not described(other, "shared", tmp_path, "n1").probe_seen
    probes.withdraw()
    probes.withdraw()
    assert list(shared.iterdir()) == []
