"""What the kernel does with descriptors of other processes: copies one for us, and says whether two things are one."""

from __future__ import annotations

import ctypes
import os

#: Each machine's number of kcmp(2). That of pidfd_getfd(2) is one on every machine.
KCMP = {"x86_64": 312, "aarch64": 272}
_PIDFD_GETFD = 438

#: Both calls are short, and made while tasks stand still for us: nobody else gets the interpreter meanwhile.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.syscall.argtypes = (ctypes.c_long,) * 6


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
