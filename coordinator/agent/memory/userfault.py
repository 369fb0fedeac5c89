"""userfaultfd(2) in asynchronous write-protect mode: made inside the target, taken out, and removed there again.

Structures and numbers: include/uapi/linux/userfaultfd.h; meaning: Documentation/admin-guide/mm/userfaultfd.rst. In
this mode nobody waits for a fault to be answered: a write to a protected page clears the page's mark and goes on.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from contextlib import suppress

from coordinator.agent.memory.base import PAGE_BYTES
from coordinator.agent.memory.ptrace import TargetGone
from coordinator.agent.memory.syscall_injection import StoppedThread, with_stopped_thread
from coordinator.agent.other_processes import copy_descriptor, kcmp
from coordinator.errors import TrackingFailed

UFFD_API = 0xAA
UFFD_USER_MODE_ONLY = 1
FEATURE_WP_HUGETLBFS_SHMEM, FEATURE_WP_UNPOPULATED, FEATURE_WP_ASYNC = 1 << 12, 1 << 13, 1 << 15
FEATURES = FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC
REGISTER_MODE_WP = 1 << 1

_KCMP_FILE = 0


class Api(ctypes.Structure):
    """struct uffdio_api."""

    _fields_ = (("api", ctypes.c_uint64), ("features", ctypes.c_uint64), ("ioctls", ctypes.c_uint64))


class Register(ctypes.Structure):
    """struct uffdio_register; its first two fields are struct uffdio_range."""

    _fields_ = (
        ("start", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("ioctls", ctypes.c_uint64),
    )


class WriteProtect(ctypes.Structure):
    """struct uffdio_writeprotect; its first two fields are struct uffdio_range."""

    _fields_ = (("start", ctypes.c_uint64), ("length", ctypes.c_uint64), ("mode", ctypes.c_uint64))


def ioctl_number(direction: int, kind: int, number: int, length: int) -> int:
    """_IOC of include/uapi/asm-generic/ioctl.h; direction 1 write, 2 read, 3 both."""
    return direction << 30 | length << 16 | kind << 8 | number


UFFDIO_API = ioctl_number(3, UFFD_API, 0x3F, ctypes.sizeof(Api))
UFFDIO_REGISTER = ioctl_number(3, UFFD_API, 0x00, ctypes.sizeof(Register))
UFFDIO_WRITEPROTECT = ioctl_number(3, UFFD_API, 0x06, ctypes.sizeof(WriteProtect))
WRITEPROTECT_MODE_WP = 1


class MemoryReplaced(Exception):
    """The descriptor's memory is no process's any more: it ended or executed another program."""


def take_userfaultfd(pid: int) -> int:
    """Descriptor of a userfaultfd for the memory of the process, which itself has none afterwards.

    Raises ``TargetGone``, or ``TrackingFailed`` with the reason."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        raise TargetGone(f"process {pid} is gone") from None
    try:
        descriptor = with_stopped_thread(pid, lambda thread: _make_inside(thread, process))
    finally:
        os.close(process)
    try:
        enable(descriptor)
    except OSError as error:
        os.close(descriptor)
        raise TrackingFailed(f"the kernel refuses asynchronous write-protection ({error.strerror})") from error
    return descriptor


def _make_inside(thread: StoppedThread, process: int) -> int:
    """Make it, copy it through the pidfd ``process``, and close it in the target."""
    number = thread.call(thread.machine.userfaultfd, os.O_CLOEXEC | os.O_NONBLOCK | UFFD_USER_MODE_ONLY)
    if number < 0:
        raise TrackingFailed(
            f"process {thread.pid}: userfaultfd is refused in it ({os.strerror(-number)})",
            "EMFILE: it has as many descriptors as it may; ENOSYS, EPERM: the kernel or a security module forbids it.",
        )
    return take_out(thread, process, number)


def take_out(thread: StoppedThread, process: int, number: int) -> int:
    """Copy a descriptor that the thread has just made through the pidfd ``process``, and close it there."""
    try:
        mine = copy_descriptor(process, number)
    except OSError as error:
        thread.call(thread.machine.close, number)
        raise TrackingFailed(
            f"process {thread.pid}: a descriptor cannot be copied out of it ({error.strerror})"
        ) from error
    # Another thread of the target could have closed the number and opened a file of its own under it: leave that.
    if not same_file(thread.tid, number, os.getpid(), mine):
        os.close(mine)
        raise TrackingFailed(f"process {thread.pid}: its threads have descriptor tables of their own")
    thread.call(thread.machine.close, number)
    return mine


def same_file(pid: int, descriptor: int, other_pid: int, other: int) -> bool:
    """Whether two descriptors of two processes are one open file (kcmp(2)); ``True`` where the kernel cannot tell."""
    result = kcmp(pid, other_pid, _KCMP_FILE, descriptor, other)
    return result == 0 or (result < 0 and ctypes.get_errno() not in (errno.EBADF, errno.ESRCH))


def enable(descriptor: int) -> None:
    """Agree on the features; raises ``OSError`` (EINVAL) on a kernel without them (before 6.7)."""
    fcntl.ioctl(descriptor, UFFDIO_API, Api(UFFD_API, FEATURES, 0))


def register(descriptor: int, start: int, end: int) -> int:
    """Have all mappings in a range tracked, or none; return 0, or the errno of the kernel's refusal: EBUSY if another
    userfaultfd has one, EPERM if one can never be written, EINVAL if one cannot be tracked.

    A mapping in which the range begins or ends is split there.

    Raises ``MemoryReplaced`` if there is no process behind the descriptor any more."""
    try:
        fcntl.ioctl(descriptor, UFFDIO_REGISTER, Register(start, end - start, REGISTER_MODE_WP, 0))
    except OSError as error:
        if error.errno in (errno.ENOMEM, errno.ESRCH):
            raise MemoryReplaced from error
        return error.errno or errno.EINVAL
    return 0


def mark(descriptor: int, start: int, end: int) -> None:
    """Mark all pages of a registered range as not written, those too that are not in the page table.

    What cannot be marked stays dirty, so a refusal is no error: the range may be gone by now."""
    with suppress(OSError):
        _write_protect(descriptor, start, end, WRITEPROTECT_MODE_WP)


def unmark(descriptor: int, start: int, end: int) -> None:
    """Take away the marks of a range, as far as it is registered. (The rest may be gone by now.)"""
    try:
        _write_protect(descriptor, start, end, 0)
    except OSError:  # that far the kernel has come, and no further
        for page in range(start, end, PAGE_BYTES):
            with suppress(OSError):
                _write_protect(descriptor, page, page + PAGE_BYTES, 0)


def _write_protect(descriptor: int, start: int, end: int, mode: int) -> None:
    fcntl.ioctl(descriptor, UFFDIO_WRITEPROTECT, WriteProtect(start, end - start, mode))
