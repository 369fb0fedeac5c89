"""Mappings, as proc(5) and the kernel's mm/ name them."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.agent.memory.base import Backing
from coordinator.agent.memory.mappings import needs_flags, parse_mapping, parse_smaps, read_mappings, tmpfs_devices

TMPFS = frozenset({"00:1a"})


@pytest.mark.parametrize(
    ("rest", "backing", "lazy"),
    [
        ("rw-p 00000000 00:00 0", Backing.ANONYMOUS, True),
        ("rw-p 00000000 00:00 0   [heap]", Backing.ANONYMOUS, True),
        ("rw-p 00000000 00:00 0   [stack]", Backing.ANONYMOUS, True),
        ("rw-p 00000000 00:00 0   [anon:arena of mine]", Backing.ANONYMOUS, True),
        ("rw-p 00000000 00:05 7   /dev/zero", Backing.ANONYMOUS, True),
        ("rw-p 00000000 00:10 9   /anon_hugepage (deleted)", Backing.ANONYMOUS, False),
        ("rw-s 00000000 00:01 9   /dev/zero (deleted)", Backing.SHMEM, False),
        ("rw-s 00000000 00:01 32769 /SYSV00000000 (deleted)", Backing.SHMEM, False),
        ("rw-s 00000000 00:01 9   /memfd:name with blank (deleted)", Backing.SHMEM, False),
        ("rw-p 00000000 00:01 9   /memfd:name (deleted)", Backing.FILE, False),
        ("rw-s 00000000 00:1a 9   /dev/shm/PostgreSQL.1", Backing.SHMEM, False),
        ("rw-s 00000000 00:1a 9   /run/segment", Backing.SHMEM, False),
        ("rw-p 00000000 00:1a 9   /run/segment", Backing.FILE, False),
        ("rw-s 00000000 00:1a 9   /dev/nvidia0", Backing.DEVICE, False),
        ("rw-s 00000000 00:0f 9   anon_inode:[io_uring]", Backing.DEVICE, False),
        ("rw-s 00000000 00:0f 9   /[aio] (deleted)", Backing.DEVICE, False),
        ("r-xp 00000000 00:00 0   [vdso]", Backing.DEVICE, False),
        ("r--p 00000000 00:00 0   [vvar_vclock]", Backing.DEVICE, False),
        ("r-xp 00001000 08:01 99  /usr/lib/libc.so.6", Backing.FILE, False),
        ("rw-s 00001000 08:01 99  /var/lib/data", Backing.FILE, False),
    ],
)
def test_what_lies_under_a_mapping(rest: str, backing: Backing, lazy: bool) -> None:
    mapping = parse_mapping(f"7f0000000000-7f0000002000 {rest}\n", TMPFS)
    assert (mapping.backing, mapping.lazy) == (backing, lazy)
    assert (mapping.start, mapping.end) == (0x7F0000000000, 0x7F0000002000)


SMAPS = """7f0000000000-7f0000002000 rw-p 00000000 00:00 0
Size:                  8 kB
Rss:                   8 kB
VmFlags: rd wr mr mw me lo ac
7f0000002000-7f0000004000 rw-p 00000000 00:00 0
Rss:                   0 kB
VmFlags: rd wr mr mw me gd ac
7f0000200000-7f0000400000 rw-p 00000000 00:10 9                          /hugetlbfs/file
VmFlags: rd wr mr mw me ht
7f0000400000-7f0000500000 rw-s 00000000 08:01 9                          /some/device
VmFlags: rd wr sh io pf
"""


def test_flags_of_smaps() -> None:
    locked, growing, huge, device = parse_smaps(SMAPS)
    assert (locked.locked, locked.lazy) == (True, False)
    assert (growing.growsdown, growing.lazy) == (True, True)
    assert huge.hugetlb
    assert device.backing is Backing.DEVICE


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("x86_Thread_features:\tshstk wrss\n", True),
        ("x86_Thread_features:\t\n", False),
        ("VmLck:\t       0 kB\nHugetlbPages:\t       0 kB\n", False),
        ("VmLck:\t      12 kB\nHugetlbPages:\t       0 kB\n", True),
        ("VmLck:\t       0 kB\nHugetlbPages:\t    2048 kB\n", True),
        ("", False),
    ],
)
def test_smaps_is_read_only_if_it_can_tell_something(status: str, expected: bool) -> None:
    assert needs_flags(status) is expected


def test_tmpfs_devices() -> None:
    mountinfo = "22 1 0:26 / /dev/shm rw shared:3 - tmpfs tmpfs rw\n23 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
    assert tmpfs_devices(mountinfo) == {"00:1a"}


def test_no_process_has_no_mappings(tmp_path: Path) -> None:
    assert read_mappings(1, tmp_path) == []
