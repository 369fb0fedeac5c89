"""Reads a process's mappings (proc(5): /proc/PID/maps, smaps, mountinfo) and says what each is made of."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

from coordinator.agent.memory.base import Backing, Mapping

PROC = Path("/proc")

#: Addresses of a process are below: above lies only the vsyscall page of x86, which is no memory of the process.
ADDRESS_LIMIT = 1 << 63

#: Made by the kernel: CRIU makes them anew on the other side (criu/proc_parse.c).
_KERNEL_MADE = ("[vdso]", "[vvar", "[vsyscall]", "[uprobes]", "[sigpage]", "[vectors]", "/[aio]")

#: Names the kernel gives to memory shared without a file system (mm/shmem.c, shmem_zero_setup; ipc/shm.c).
_SHMEM_NAMES = ("/dev/zero", "/SYSV", "/memfd:")


def parse_mapping(line: str, tmpfs: frozenset[str] = frozenset()) -> Mapping:
    """One line of /proc/PID/maps. ``tmpfs``: devices ("major:minor", hexadecimal) of mounted tmpfs file systems."""
    fields = line.split(maxsplit=5)
    start, _, end = fields[0].partition("-")
    name = fields[5].rstrip("\n").strip() if len(fields) > 5 else ""
    permissions, device, inode = fields[1], fields[3], int(fields[4])
    return Mapping(
        start=int(start, 16),
        end=int(end, 16),
        permissions=permissions,
        backing=_backing(permissions, device, inode, name, tmpfs),
        offset=int(fields[2], 16),
        device=device,
        inode=inode,
        name=name,
        hugetlb=name.startswith("/anon_hugepage"),
        growsdown=name == "[stack]",
    )


def _backing(permissions: str, device: str, inode: int, name: str, tmpfs: frozenset[str]) -> Backing:
    shared = permissions.endswith("s")
    if name.startswith(_KERNEL_MADE):
        return Backing.DEVICE
    # MAP_HUGETLB has an inode of the kernel's own, without a file; a private mapping of /dev/zero has no file's pages.
    if inode == 0 or name.startswith("/anon_hugepage") or (name == "/dev/zero" and not shared):
        return Backing.SHMEM if shared else Backing.ANONYMOUS
    if name.startswith(_SHMEM_NAMES) or name.startswith("/dev/shm/"):
        return Backing.SHMEM if shared else Backing.FILE
    if name.startswith(("/dev/", "anon_inode:")):  # before tmpfs: a container's /dev is one, with devices in it
        return Backing.DEVICE
    return Backing.SHMEM if shared and device in tmpfs else Backing.FILE


def parse_smaps(text: str, tmpfs: frozenset[str] = frozenset()) -> list[Mapping]:
    """/proc/PID/smaps: as maps, with the flags of "VmFlags" (Documentation/filesystems/proc.rst)."""
    found: list[Mapping] = []
    for line in text.splitlines():
        word = line.partition(" ")[0]
        if word == "VmFlags:":
            flags = frozenset(line.split()[1:])
            found[-1] = replace(
                found[-1],
                locked="lo" in flags,
                hugetlb="ht" in flags,
                growsdown="gd" in flags,
                backing=Backing.DEVICE if flags & {"io", "pf", "ss"} else found[-1].backing,
            )
        elif not word.endswith(":"):
            found.append(parse_mapping(line, tmpfs))
    return found


def parse_flags(smaps: str) -> dict[tuple[int, int], frozenset[str]]:
    """The flags ("VmFlags") of every mapping in /proc/PID/smaps, by its start and end."""
    found: dict[tuple[int, int], frozenset[str]] = {}
    span = (0, 0)
    for line in smaps.splitlines():
        word = line.partition(" ")[0]
        if word == "VmFlags:":
            found[span] = frozenset(line.split()[1:])
        elif not word.endswith(":"):
            start, _, end = word.partition("-")
            span = (int(start, 16), int(end, 16))
    return found


def read_flags(pid: int) -> dict[tuple[int, int], frozenset[str]]:
    """As ``parse_flags``; empty if the process is gone. Walks all its page tables: some milliseconds a gigabyte."""
    try:
        return parse_flags((PROC / str(pid) / "smaps").read_text(errors="surrogateescape"))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH):
            return {}
        raise


def tmpfs_devices(mountinfo: str) -> frozenset[str]:
    """Devices of the tmpfs file systems in /proc/PID/mountinfo, written as in maps (hexadecimal)."""
    found = set()
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        if after.split(" ", 1)[0] in ("tmpfs", "shm"):
            major, _, minor = before.split()[2].partition(":")
            found.add(f"{int(major):02x}:{int(minor):02x}")
    return frozenset(found)


def needs_flags(status: str) -> bool:
    """Whether /proc/PID/status tells of locked or huge pages, or of shadow stacks (x86), so that maps alone would not
    do.

    smaps walks every page table of the process; maps does not. So smaps is read only where it can tell something."""
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name in ("VmLck", "HugetlbPages") and value.split()[:1] != ["0"]:
            return True
        if name == "x86_Thread_features" and "shstk" in value.split():
            return True
    return False


def read_mappings(pid: int, proc: Path = PROC) -> list[Mapping]:
    """The mappings of a process, by address. Empty if it is gone, a zombie or a kernel thread."""
    directory = proc / str(pid)
    try:
        tmpfs = tmpfs_devices((directory / "mountinfo").read_text(errors="surrogateescape"))
        if needs_flags((directory / "status").read_text(errors="replace")):
            return parse_smaps((directory / "smaps").read_text(errors="surrogateescape"), tmpfs)
        lines = (directory / "maps").read_text(errors="surrogateescape").splitlines()
    except OSError as error:
        # mountinfo of a process that is exiting is EINVAL (fs/proc_namespace.c, mounts_open_common).
        if error.errno in (errno.ENOENT, errno.ESRCH, errno.EINVAL):
            return []
        raise
    return [parse_mapping(line, tmpfs) for line in lines]
