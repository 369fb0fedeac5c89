"""What the kernel does with descriptors of other processes: lists them, copies one for us, and says whether two things
are one."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

#: Each machine's number of kcmp(2). That of pidfd_getfd(2) is one on every machine.
KCMP = {"x86_64": 312, "aarch64": 272}
_PIDFD_GETFD = 438

#: Both calls are short, and made while tasks stand still for us: nobody else gets the interpreter meanwhile.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.syscall.argtypes = (ctypes.c_long,) * 6


def descriptors(pid: int) -> Iterator[tuple[str, str]]:
    """The numbers of a process's descriptors, with what they lead to (proc(5)); no more of them once it is gone."""
    try:
        folder = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return
    try:
        for number in os.listdir(folder):  # noqa: PTH208 - a Path takes as long as the call
            try:
                yield number, os.readlink(number, dir_fd=folder)
            except FileNotFoundError:  # closed meanwhile
                continue
    except (FileNotFoundError, PermissionError):  # what a process that is gone makes of the two calls (fs/proc/fd.c)
        if os.path.exists(f"/proc/{pid}/fd"):  # noqa: PTH110
            raise
    finally:
        os.close(folder)


def copy_descriptor(process: int, number: int) -> int:
    """A descriptor of the process of a pidfd, for us too (pidfd_getfd(2)). Raises ``OSError``: EBADF where it has none
    of that number, ESRCH where it is gone, EPERM where a security module forbids it."""
    copied = int(_libc.syscall(_PIDFD_GETFD, process, number, 0, 0, 0))
    if copied < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return copied


def kcmp(pid: int, other_pid: int, what: int, first: int = 0, second: int = 0) -> int:
    """What kcmp(2) answers: 0 for the same, -1 where it cannot tell."""
    return int(_libc.syscall(KCMP.get(os.uname().machine, -1), pid, other_pid, what, first, second))
