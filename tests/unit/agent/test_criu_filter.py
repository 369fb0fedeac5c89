"""What the kernel decides about CRIU's system calls: the filter's program."""

from __future__ import annotations

import os
import struct

import pytest

from coordinator.agent.criu_filter import filter_program
from coordinator.agent.epolls import KCMP_EPOLL_TFD
from coordinator.agent.memory.pagemap import PAGEMAP_SCAN

ALLOW, ASK, RETURN_0 = 0x7FFF0000, 0x7FC00000, 0x00050000
#: The architecture, and the numbers of ioctl and kcmp.
X86, ARM = (0xC000003E, 16, 312), (0xC00000B7, 29, 272)

each_machine = pytest.mark.parametrize(
    ("machine", "own", "other"), [("x86_64", X86, ARM), ("aarch64", ARM, X86)], ids=["x86_64", "aarch64"]
)


def verdict(program: bytes, architecture: int, number: int, *arguments: int) -> int:
    """What the kernel decides about a system call: runs the filter's instructions."""
    data = struct.pack("=iIQ6Q", number, architecture, 0, *(*arguments, 0, 0, 0, 0, 0)[:6])
    code = list(struct.iter_unpack("=HBBI", program))
    at = value = 0
    while True:
        operation, yes, no, constant = code[at]
        at += 1
        if operation == 0x20:
            (value,) = struct.unpack_from("=I", data, constant)
        elif operation == 0x15:
            at += yes if value == constant else no
        else:
            assert operation == 0x06
            return int(constant)


@each_machine
@pytest.mark.parametrize("epolls", [False, True])
def test_the_filter_asks_about_scans_alone(
    machine: str, own: tuple[int, int, int], other: tuple[int, int, int], epolls: bool
) -> None:
    program = filter_program(machine, scans=True, epolls=epolls)
    architecture, ioctl, _ = own
    assert verdict(program, architecture, ioctl, 3, PAGEMAP_SCAN) == ASK
    assert verdict(program, architecture, ioctl, 3, PAGEMAP_SCAN | 0xFFFFFFFF << 32) == ASK  # 32 bits count
    assert verdict(program, architecture, ioctl, 3, PAGEMAP_SCAN + 1) == ALLOW
    assert verdict(program, architecture, ioctl, PAGEMAP_SCAN, 3) == ALLOW
    assert verdict(program, architecture, ioctl + 1, 3, PAGEMAP_SCAN) == ALLOW
    assert verdict(program, other[0], other[1], 3, PAGEMAP_SCAN) == ALLOW
    assert verdict(program, 0x40000003, 54, 3, PAGEMAP_SCAN) == ALLOW  # 32-bit x86
    assert verdict(program, architecture, ioctl | 0x40000000, 3, PAGEMAP_SCAN) == ALLOW  # x32


@each_machine
def test_the_filter_asks_where_files_have_data(
    machine: str, own: tuple[int, int, int], other: tuple[int, int, int]
) -> None:
    lseek = {"x86_64": 8, "aarch64": 62}[machine]
    program = filter_program(machine, seeks=True, epolls=True)
    assert verdict(program, own[0], lseek, 3, 4096, os.SEEK_DATA) == ASK
    assert [verdict(program, own[0], lseek, 3, os.SEEK_DATA, how) for how in (0, 1, 2, os.SEEK_HOLE)] == [ALLOW] * 4
    assert verdict(program, other[0], lseek, 3, 4096, os.SEEK_DATA) == ALLOW
    assert verdict(filter_program(machine, epolls=True), own[0], lseek, 3, 0, os.SEEK_DATA) == ALLOW


@each_machine
@pytest.mark.parametrize("scans", [False, True])
def test_the_filter_says_yes_about_entries_of_epolls_alone(
    machine: str, own: tuple[int, int, int], other: tuple[int, int, int], scans: bool
) -> None:
    program = filter_program(machine, scans=scans, epolls=True)
    architecture, _, kcmp = own
    assert verdict(program, architecture, kcmp, 10, 10, KCMP_EPOLL_TFD, 5, 6) == RETURN_0
    assert verdict(program, architecture, kcmp, 10, KCMP_EPOLL_TFD, 0, 5, 6) == ALLOW
    assert [verdict(program, architecture, kcmp, 10, 10, kind) for kind in range(KCMP_EPOLL_TFD)] == [ALLOW] * 7
    assert verdict(program, architecture, kcmp + 1, 10, 10, KCMP_EPOLL_TFD) == ALLOW
    assert verdict(program, other[0], other[2], 10, 10, KCMP_EPOLL_TFD) == ALLOW


@each_machine
def test_what_is_not_wanted_is_allowed(machine: str, own: tuple[int, int, int], other: tuple[int, int, int]) -> None:
    architecture, ioctl, kcmp = own
    assert verdict(filter_program(machine, scans=False, epolls=True), architecture, ioctl, 3, PAGEMAP_SCAN) == ALLOW
    assert verdict(filter_program(machine), architecture, kcmp, 10, 10, KCMP_EPOLL_TFD) == ALLOW
