"""Which tracker this kernel offers, found by trying it on pages of our own."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from dataclasses import dataclass
from typing import Literal

from coordinator.agent.memory.base import PAGE_BYTES
from coordinator.agent.memory.pagemap import PRESENT, WRITTEN, Pagemap
from coordinator.agent.memory.registers import this_machine
from coordinator.agent.memory.soft_dirty import SoftDirtyTracker, soft_dirty_available
from coordinator.agent.memory.tree import MakeTracker
from coordinator.agent.memory.userfault import UFFD_USER_MODE_ONLY, enable, register
from coordinator.agent.memory.write_protect import WriteProtectTracker
from coordinator.errors import LivemoveError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2


@dataclass(frozen=True, slots=True)
class Choice:
    """A tracker, why it is that one, and how to make it for a process (``None``: stop and copy)."""

    name: Literal["write_protect", "soft_dirty", "none"]
    reason: str
    make: MakeTracker | None


def choose_tracker() -> Choice:
    """The best tracker of this kernel. Takes about a millisecond and leaves nothing behind."""
    refusal = why_not_write_protect()
    if refusal is None:
        return Choice("write_protect", "asynchronous write-protection works on this kernel", WriteProtectTracker)
    if this_machine() is not None and soft_dirty_available():
        return Choice("soft_dirty", f"soft-dirty bits, because {refusal}", SoftDirtyTracker)
    return Choice("none", f"{refusal}; and this kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)", None)


def why_not_write_protect() -> str | None:
    """Why the write-protect tracker cannot work here, or ``None`` if it does: tried end to end, but for the
    injection."""
    machine = this_machine()
    if machine is None:
        return f"no register layout is known for {os.uname().machine}"
    descriptor = int(_libc.syscall(machine.userfaultfd, os.O_CLOEXEC | os.O_NONBLOCK | UFFD_USER_MODE_ONLY))
    if descriptor < 0:
        return f"userfaultfd is refused ({os.strerror(ctypes.get_errno())})"
    try:
        return _try_on_own_page(descriptor)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTTY):
            return "the kernel has no asynchronous write-protection (Linux 6.7, CONFIG_USERFAULTFD)"
        return f"asynchronous write-protection fails ({error.strerror})"
    except LivemoveError as error:
        return error.message
    finally:
        os.close(descriptor)


def _try_on_own_page(descriptor: int) -> str | None:
    enable(descriptor)
    with (
        mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page,
        Pagemap(os.getpid()) as pagemap,
    ):
        anchor = ctypes.c_char.from_buffer(page)
        start = ctypes.addressof(anchor)
        del anchor
        page[0] = 1
        refusal = register(descriptor, start, start + PAGE_BYTES)
        if refusal:
            return f"a page cannot be registered ({os.strerror(refusal)})"

        def written(protect: bool = False) -> bool:
            regions = pagemap.scan(start, start + PAGE_BYTES, present=WRITTEN, any_of=PRESENT, protect=protect)
            return any(True for _ in regions)

        first = written(protect=True)
        quiet = written()
        page[0] = 2
        if not (first and not quiet and written(protect=True)):
            return "the kernel does not tell written pages from others"
        return _try_to_move(start, pagemap)


def _try_to_move(page: int, pagemap: Pagemap) -> str | None:
    """Move a registered and marked page. Where it keeps its mark, writes do not clear that any more, and once the page
    is registered again it would never look written."""
    target = _libc.mmap(None, PAGE_BYTES, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    moved = _libc.mremap(page, PAGE_BYTES, PAGE_BYTES, _MREMAP_MAYMOVE | _MREMAP_FIXED, target)
    if moved != target:
        return f"a registered page cannot be moved ({os.strerror(ctypes.get_errno())})"
    try:
        fresh = any(True for _ in pagemap.scan(moved, moved + PAGE_BYTES, present=WRITTEN, any_of=PRESENT))
    finally:
        # Back to where the caller unmaps it.
        _libc.mremap(moved, PAGE_BYTES, PAGE_BYTES, _MREMAP_MAYMOVE | _MREMAP_FIXED, page)
    return None if fresh else "a moved page keeps the mark it had (mended in Linux 6.13 and 6.12.10)"
