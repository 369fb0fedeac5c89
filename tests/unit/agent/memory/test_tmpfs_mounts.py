"""Which tmpfs mounts can be brought over, and what room they get meanwhile."""

from __future__ import annotations

import pytest

from coordinator.agent.memory.tmpfs_mounts import limits, mounted, movable, roomier

OURS = """\
24 1 0:20 / / rw,relatime - overlay overlay rw
30 24 0:27 / /dev/shm rw,nosuid - tmpfs tmpfs rw,size=100k
"""
ROOT = "100 99 0:20 /srv/rootfs / ro - overlay overlay rw\n101 100 0:119 / /dev rw - tmpfs tmpfs rw,mode=755\n"
SHM = "105 101 0:122 / /dev/shm rw,nosuid,nodev,relatime - tmpfs shm rw,size=65536k,mode=1770,uid=7,inode64\n"


def test_a_mount_of_the_workload_alone() -> None:
    (found,) = movable(ROOT + SHM, OURS)
    assert (found.device, found.point, found.source) == ("00:7a", "/dev/shm", "shm")
    assert found.options == "rw,size=65536k,mode=1770,uid=7,inode64"
    assert mounted(ROOT + SHM)["/dev/shm"] == "00:7a"


@pytest.mark.parametrize(
    "change",
    [
        ("0:122", "0:27"),  # the host's own
        (" / /dev/shm", " /part /dev/shm"),  # a part of one
        ("relatime - ", "relatime shared:5 - "),
        ("relatime - ", "relatime master:5 - "),
        ("tmpfs shm", "ramfs shm"),
        ("rw,size", "ro,size"),
        ("inode64", "mpol=bind:0"),
        ("inode64", "seclabel"),
        ("inode64", "usrquota"),
        ("/dev/shm", "/dev/a\\\\040name"),
        ("/dev/shm", "/dev/a]"),
        ("tmpfs shm", "tmpfs a\\\\040name"),
        ("0:122", "0:119"),  # mounted twice
    ],
)
def test_all_others_are_left_to_criu(change: tuple[str, str]) -> None:
    assert change[0] in SHM
    assert movable(ROOT + SHM.replace(change[0], change[1].replace("\\\\", "\\")), OURS) == ()


@pytest.mark.parametrize(
    "more",
    [
        "106 105 0:130 / /dev/shm/below rw - ext4 /dev/sda rw\n",
        "106 105 0:130 / /dev/shm rw - ext4 /dev/sda rw\n",
        "106 100 0:122 /a /again rw - tmpfs shm rw\n",
        "106 100 0:130 / /dev/shm rw - ext4 /dev/sda rw\n",
    ],
)
def test_what_is_mounted_below_above_or_elsewhere_counts(more: str) -> None:
    assert "/dev/shm" not in [each.point for each in movable(ROOT + SHM + more, OURS)]


@pytest.mark.parametrize(
    ("options", "said", "more"),
    [
        ("rw,size=65536k,mode=1770", "size=65536k", "mode=1770,size=131072k"),
        ("rw,nr_inodes=40,size=8k,inode64", "size=8k,nr_inodes=40", "inode64,size=16k,nr_inodes=80"),
        ("rw", "", ""),
        ("rw,huge=always", "", "huge=always"),
    ],
)
def test_there_is_more_room_while_it_is_filled(options: str, said: str, more: str) -> None:
    assert limits(options) == said
    assert roomier(options) == more
