"""Reads process trees from /proc (proc(5)): who belongs to a workload, how much memory, what stands in a move's way."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")


def process_tree(root_pid: int, proc: Path = PROC) -> list[int]:
    """The pids of a process and all its living descendants, the root first. Empty if the root is gone.

    /proc/PID/task/TID/children needs CONFIG_PROC_CHILDREN, which CRIU needs as well."""
    found: list[int] = []
    queue = [root_pid]
    while queue:
        pid = queue.pop(0)
        if pid in found or not (proc / str(pid)).exists():
            continue
        found.append(pid)
        for thread in threads(pid, proc):
            queue.extend(int(child) for child in _read(proc / str(pid) / "task" / str(thread) / "children").split())
    return found


def threads(pid: int, proc: Path = PROC) -> list[int]:
    """The thread ids of a process, its own pid among them."""
    try:
        return sorted(int(entry.name) for entry in (proc / str(pid) / "task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return []


def all_ids(proc: Path = PROC) -> list[int]:
    """All process and thread ids in use in this pid namespace."""
    return sorted(
        {thread for entry in proc.iterdir() if entry.name.isdigit() for thread in threads(int(entry.name), proc)}
    )


def memory_bytes(pids: Iterable[int], proc: Path = PROC) -> int:
    """Resident memory of the processes together; pages shared among them count once (Pss of smaps_rollup)."""
    total_kib = 0
    for pid in pids:
        for line in _read(proc / str(pid) / "smaps_rollup").splitlines():
            if line.startswith("Pss:"):
                total_kib += int(line.split()[1])
    return total_kib * 1024


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
