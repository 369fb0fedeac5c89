"""What of a process CRIU would refuse: seen in a /proc made for it, and in that of real processes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coordinator.agent.obstacles import MOST_DELETED_BYTES, obstacles
from coordinator.facts import WorkloadSpec

WORKLOAD = WorkloadSpec(name="db", runtime="runc", container="db", bundle="/srv/db", addresses=("192.0.2.200/24",))
MOUNTS = "25 1 0:22 / / rw - overlay root rw\n31 25 0:26 / /data rw - ext4 disk rw\n"
IPC_ROW = "7f0000000000-7f0000001000 rw-s 00000000 00:01 5      /SYSV001bc022 (deleted)\n"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """Process 10, with a regular file open as descriptor 2, and ourselves."""
    (tmp_path / "log").write_text("")
    for name in ("10/fd", "10/fdinfo", "10/ns", "self/ns"):
        (tmp_path / "proc" / name).mkdir(parents=True)
    made = tmp_path / "proc"
    (made / "10/mountinfo").write_text(MOUNTS)
    (made / "10/maps").write_text("")
    (made / "10/fd/2").symlink_to(tmp_path / "log")
    (made / "10/fdinfo/2").write_text("pos:\t0\nflags:\t02100001\nmnt_id:\t31\n")
    (made / "10/ns/ipc").symlink_to("ipc:[4026532222]")
    (made / "self/ns/ipc").symlink_to("ipc:[4026531839]")
    return made


def codes(proc: Path, pid: int = 10, missing: tuple[str, ...] = ()) -> list[str]:
    return [each.code for each in obstacles(WORKLOAD, [pid], missing, proc)]


def test_a_file_of_its_own_mounts_is_no_obstacle(proc: Path) -> None:
    assert codes(proc) == []


def test_a_file_of_the_hosts_is_one(proc: Path) -> None:
    (proc / "10/fdinfo/2").write_text("pos:\t0\nmnt_id:\t77\n")
    (found,) = obstacles(WORKLOAD, [10], (), proc)
    assert found.code == "FILE_OUTSIDE"
    assert found.fatal
    assert str(proc.parent / "log") in found.message
    assert "descriptor 2" in found.message


@pytest.mark.parametrize("target", ["/dev/null", "pipe:[77]", "/memfd:shared (deleted)"])
def test_what_is_no_regular_file_of_a_mount_is_none(proc: Path, target: str) -> None:
    (proc / "10/fd/7").symlink_to(target)
    (proc / "10/fdinfo/7").write_text("mnt_id:\t77\n")
    assert codes(proc) == []


def test_a_system_v_segment_in_the_hosts_namespace(proc: Path) -> None:
    (proc / "10/maps").write_text(IPC_ROW)
    assert codes(proc) == []
    (proc / "10/ns/ipc").unlink()
    (proc / "10/ns/ipc").symlink_to("ipc:[4026531839]")
    (found,) = obstacles(WORKLOAD, [10], (), proc)
    assert found.code == "SYSV_SHARED_WITH_HOST"
    assert "/SYSV001bc022" in found.message


def test_a_large_file_that_is_deleted(proc: Path, tmp_path: Path) -> None:
    with (tmp_path / "deleted").open("wb") as file:
        (tmp_path / "deleted").unlink()
        (proc / "10/fd/7").symlink_to(f"/proc/self/fd/{file.fileno()}")
        (proc / "10/fdinfo/7").write_text("mnt_id:\t31\n")
        os.posix_fallocate(file.fileno(), 0, MOST_DELETED_BYTES)
        assert codes(proc) == []
        os.posix_fallocate(file.fileno(), 0, MOST_DELETED_BYTES + (1 << 20))
        (found,) = obstacles(WORKLOAD, [10], (), proc)
    assert (found.code, found.fatal) == ("DELETED_FILE_LARGE", True)
    assert "a deleted file of 33 MiB open, as descriptor 7" in found.message


def test_another_uid_without_the_capability(proc: Path) -> None:
    os.chown(proc / "10", 102, 102)
    assert codes(proc) == []
    assert codes(proc, missing=("CAP_SYS_RESOURCE",)) == ["UID_NEEDS_CAP_SYS_RESOURCE"]


def test_a_process_that_has_ended(proc: Path) -> None:
    assert codes(proc, pid=11) == []


@contextmanager
def running(*argv: str, stdout: int) -> Iterator[int]:
    """A process that has come as far as its last program."""
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(500):
                if Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n":
                    break
                time.sleep(0.01)
            yield process.pid
        finally:
            process.kill()


def test_real_processes_with_a_log_file_of_ours(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        with running("unshare", "--mount", "sleep", "60", stdout=log.fileno()) as pid:
            assert codes(Path("/proc"), pid) == ["FILE_OUTSIDE"]
        with running("sleep", "60", stdout=log.fileno()) as pid:
            assert codes(Path("/proc"), pid) == []


PLAIN = WorkloadSpec(name="plain", runtime="process", pid_file="/run/plain.pid", addresses=("192.0.2.200/24",))


def of_tree(*pids: int) -> list[str]:
    return [each.code for each in obstacles(PLAIN, list(pids), ())]


def test_a_pipe_between_two_processes_of_the_workload_moves_with_them() -> None:
    with subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as reader:
        assert reader.stdin is not None
        with running("sleep", "60", stdout=reader.stdin.fileno()) as writer:
            reader.stdin.close()
            assert of_tree(reader.pid, writer) == []
            assert of_tree(reader.pid) == of_tree(writer) == ["EXTERNAL_PIPE"]
        reader.kill()


def test_a_terminal_whose_master_the_workload_holds_moves_with_it() -> None:
    master, terminal = os.openpty()
    try:
        with running("sleep", "60", stdout=terminal) as outside:
            assert of_tree(outside) == ["TERMINAL"]
            with running("sleep", "60", stdout=master) as holder:  # of all that a process may have it as
                assert of_tree(outside, holder) == []
                in_a_container = obstacles(WORKLOAD, [outside, holder], ())  # may be another one of the same name
                assert [each.code for each in in_a_container] == ["TERMINAL"]
    finally:
        os.close(terminal)
        os.close(master)


def test_a_real_segment() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    segment = libc.shmget(0, 4096, 0o1600)
    assert segment >= 0, os.strerror(ctypes.get_errno())
    try:
        address = libc.shmat(segment, None, 0)
        assert codes(Path("/proc"), os.getpid()) == ["SYSV_SHARED_WITH_HOST"]
        libc.shmdt(ctypes.c_void_p(address))
        assert codes(Path("/proc"), os.getpid()) == []
    finally:
        libc.shmctl(segment, 0, None)
