"""Process trees as /proc shows them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from coordinator.agent.tasks import all_ids, memory_bytes, process_tree, threads


def proc(folder: Path, tree: dict[int, dict[int, list[int]]]) -> Path:
    """A /proc with processes, their threads, and the children of each thread."""
    for pid, tasks in tree.items():
        for thread, children in tasks.items():
            (folder / f"{pid}/task/{thread}").mkdir(parents=True)
            (folder / f"{pid}/task/{thread}/children").write_text("".join(f"{child} " for child in children))
    (folder / "self").mkdir()
    return folder


def test_a_tree_has_the_children_of_every_thread(tmp_path: Path) -> None:
    made = proc(tmp_path, {10: {10: [20], 11: [30]}, 20: {20: []}, 30: {30: [40]}, 40: {40: []}, 50: {50: []}})
    assert process_tree(10, made) == [10, 20, 30, 40]
    assert process_tree(30, made) == [30, 40]
    assert process_tree(99, made) == []
    assert all_ids(made) == [10, 11, 20, 30, 40, 50]


def test_a_child_that_has_ended_meanwhile_is_left_out(tmp_path: Path) -> None:
    made = proc(tmp_path, {10: {10: [20, 21]}, 21: {21: []}})
    assert process_tree(10, made) == [10, 21]
    assert threads(20, made) == []


def test_memory_is_counted_once_where_it_is_shared(tmp_path: Path) -> None:
    for pid, pss in ((1, 100), (2, 24)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / f"{pid}/smaps_rollup").write_text(f"Rss: 1000 kB\nPss:      {pss} kB\nPss_Anon: 7 kB\n")
    assert memory_bytes([1, 2, 3], tmp_path) == 124 * 1024


def test_a_real_tree() -> None:
    with subprocess.Popen(["sh", "-c", "echo; read line; :"], stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert process_tree(process.pid) == [process.pid]
        assert memory_bytes([process.pid]) > 0
        process.communicate(b"\n")
    assert process_tree(process.pid) == []
