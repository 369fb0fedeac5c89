"""Moves of this process to the group it is in: only while they are wanted, and where there are groups."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from coordinator.agent.control_group import group_of_process
from coordinator.agent.group_moves import GroupMoves

PATIENCE_S = 10.0


def movers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "group-moves"]


def test_it_moves_itself_again_and_again_until_the_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cgroup.procs")
    moves = GroupMoves(tmp_path)
    moves.begin()
    (thread,) = movers()
    with (tmp_path / "cgroup.procs").open("rb", buffering=0) as reader:
        assert [reader.read(1) for _ in range(3)] == [b"0"] * 3
        moves.end()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_a_group_that_takes_nobody_is_left_alone(tmp_path: Path) -> None:
    moves = GroupMoves(tmp_path / "gone")
    moves.begin()
    for thread in movers():
        thread.join(PATIENCE_S)
    assert movers() == []


def test_without_a_group_nothing_goes_on() -> None:
    GroupMoves(None).begin()
    assert movers() == []


def test_the_group_of_a_process_is_found_in_either_place(tmp_path: Path) -> None:
    line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::/"))
    for base in (tmp_path / "plain", tmp_path / "hybrid" / "unified"):
        group = base / line[len("0::/") :]
        group.mkdir(parents=True)
        (base / "cgroup.controllers").touch()
        (group / "cgroup.events").touch()
        assert group_of_process("self", tmp_path / base.relative_to(tmp_path).parts[0]) == group


def test_a_process_that_is_gone_has_no_group(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").touch()
    assert group_of_process(1 << 22, tmp_path) is None
