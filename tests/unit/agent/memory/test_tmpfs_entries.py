"""Lists of what is in a tmpfs: what is refused, and that large ones come in pieces. (What is made of them is compared
with the real thing in the contract tests.)"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.agent.memory.tmpfs_entries import Maker, listed, walk
from coordinator.errors import ProtocolError


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def entry(path: list[str], **more: Any) -> dict[str, Any]:
    own = (os.getuid(), os.getgid())
    return {"path": path, "mode": 0o600, "owner": own, "times": (0, 0), "size": 0, "attributes": {}, **more}


def nothing(_: int) -> int:
    raise KeyError("no such number")


@pytest.mark.parametrize(
    "wrong",
    [
        b"no list",
        b"[7]",
        b"[{}]",
        json.dumps([entry(["..", "x"], kind="file")]).encode(),
        json.dumps([entry(["a/b"], kind="file")]).encode(),
        json.dumps([entry([""], kind="folder")]).encode(),
        json.dumps([entry(["x"], kind="link", to=["..", "y"])]).encode(),
        json.dumps([entry(["x"], kind="pages", number=-7)]).encode(),
    ],
)
def test_what_is_no_list_of_files_is_refused(root: int, wrong: bytes) -> None:
    with pytest.raises(ProtocolError):
        Maker(root, nothing).put(wrong, memoryview(b""))


def test_nothing_is_written_behind_a_symbolic_link(root: int, tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    entries = [entry(["link"], kind="symlink", to=str(outside)), entry(["link", "x"], kind="file")]
    with pytest.raises(OSError, match="link"):
        Maker(root, nothing).put(json.dumps(entries).encode(), memoryview(b""))
    assert list(outside.iterdir()) == []


def test_many_files_come_in_pieces(root: int, tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"file-{number}").write_bytes(bytes([number]) * 700_000)
    found = list(walk(root))
    assert [each.path for each in found] == [(), *((f"file-{number}",) for number in range(5))]
    pieces = list(listed(root, found, {}))
    assert [len(contents) for _, contents in pieces] == [1_400_000, 1_400_000, 700_000]
    assert [len(json.loads(entries)) for entries, _ in pieces] == [3, 2, 1]


def test_a_large_file_that_was_not_copied_is_missed(root: int, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    with pytest.raises(KeyError):
        list(listed(root, walk(root), {}))
