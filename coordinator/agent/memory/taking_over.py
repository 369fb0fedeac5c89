"""The destination's side of shared objects that come outside of CRIU's images (``handing_over``).

Their pages are written into memfds of our own as they arrive. CRIU's restore makes a memfd for each, finds its image
empty, and maps it in every process (criu/memfd.c, memfd_open_inode_nocache; criu/shmem.c, open_shmem). In between, in
the moment in which it opens the image, it is held (fanotify), and finds ours under the number of its own when it goes
on: so that is what it maps. Nothing is copied in the freeze, and nothing is missing when the tasks run.

Where that does not come about (a kernel without fanotify, a CRIU that goes another way), ``check`` sees it and copies
the content into what CRIU has made, before the tasks run: some 0.4 ms for each megabyte of the freeze, and as right.

The memory counts as used by the control group of the agent that has written it, not as the container's.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from contextlib import closing
from pathlib import Path

from coordinator.agent.memory.base import PAGE_BYTES, Mapping
from coordinator.agent.memory.descriptor_injection import put_in_place
from coordinator.agent.memory.held_open import HeldOpen
from coordinator.agent.memory.mappings import read_mappings
from coordinator.agent.memory.shared_objects import extents
from coordinator.agent.memory.tree import inner_pid
from coordinator.agent.messages import HandedOver
from coordinator.agent.tasks import process_tree
from coordinator.errors import LivemoveError, RestoreFailed

#: include/uapi/linux/falloc.h.
_KEEP_SIZE, _PUNCH_HOLE = 0x1, 0x2
_COPY_BYTES = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)


class ReceivedObjects:
    """The shared objects of one migration, by the source's numbers. ``close`` it."""

    def __init__(self) -> None:
        self._descriptors: dict[int, int] = {}
        self._complete: list[HandedOver] = []
        self._until: socket.socket | None = None
        self._waiting: list[threading.Thread] = []
        self._reasons: list[str] = []

    def make(self, number: int, name: str, *, sealable: bool) -> None:
        """Make an empty one, if there is none of that number."""
        if number not in self._descriptors:
            flags = os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if sealable else 0)
            self._descriptors[number] = os.memfd_create(name, flags)

    def keep(self, number: int, descriptor: int) -> None:
        """One that was made elsewhere, and is ours from now on."""
        self._descriptors[number] = descriptor

    def descriptor(self, number: int) -> int:
        """The descriptor of one that there is."""
        return self._descriptors[number]

    def forget(self, number: int) -> None:
        """Give up one of them."""
        os.close(self._descriptors.pop(number))

    def put(self, number: int, start: int, data: memoryview) -> None:
        """Write pages at an offset. Raises ``OSError`` (ENOMEM, ENOSPC) if the host has no memory left."""
        while data:
            written = os.pwrite(self._descriptors[number], data, start)
            data, start = data[written:], start + written

    def drop(self, number: int, start: int, pages: int) -> None:
        """Make these pages a hole again."""
        _punch(self._descriptors[number], start, pages * PAGE_BYTES)

    def read(self, number: int, start: int, pages: int) -> bytes:
        """The content of consecutive pages; those that never came are zero."""
        return os.pread(self._descriptors[number], pages * PAGE_BYTES, start).ljust(pages * PAGE_BYTES, b"\0")

    def complete(self, message: HandedOver) -> None:
        """All of it is here."""
        os.ftruncate(self._descriptors[message.number], message.size)
        self._complete.append(message)

    def arm(self, images: Path) -> None:
        """The images are there, and CRIU has not read them: hold it at those of our objects."""
        if not self._complete:
            return
        self._until, until = socket.socketpair()
        for each in self._complete:
            try:
                held = HeldOpen(images / each.image)
                arguments = (held, until.dup(), each, self._descriptors[each.number], self._reasons)
                thread = threading.Thread(target=_wait_and_put, args=arguments, name="taking-over", daemon=True)
                thread.start()
                self._waiting.append(thread)
            except OSError as error:
                self._reasons.append(str(error))
        until.close()

    def check(self, root_pid: int) -> tuple[str, ...]:
        """The tasks are restored and held: what they have mapped is ours, or holds the same; returns a sentence for
        each that had to be copied.

        Raises ``RestoreFailed`` where it cannot be brought about."""
        outer = {inner_pid(pid): pid for pid in process_tree(root_pid)} if self._complete else {}
        copied: list[str] = []
        for each in self._complete:
            ours = os.fstat(self._descriptors[each.number])
            try:
                pid, mapping = _restored(outer, each)
                if mapping.inode != ours.st_ino:
                    _copy(self._descriptors[each.number], pid, mapping)
                    why = "; ".join(self._reasons) or "CRIU did not open its image"
                    copied.append(f"{each.size >> 20} MiB of shared memory were copied in the freeze: {why}")
            except (OSError, LookupError) as error:
                raise RestoreFailed(f"shared memory at {each.address:#x} of process {each.pid}: {error}") from error
        self.close()
        return tuple(copied)

    def close(self) -> None:
        """Give up what is ours; what the tasks have mapped is theirs. Idempotent."""
        if self._until is not None:
            self._until.close()  # whoever still waits ends
            self._until = None
        for thread in self._waiting:
            thread.join()
        self._waiting.clear()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._complete.clear()


def _wait_and_put(held: HeldOpen, until: socket.socket, wanted: HandedOver, ours: int, said: list[str]) -> None:
    """One object's thread: wait for CRIU, and give it our memfd."""
    with until, closing(held):
        pid = held.wait(until.fileno(), lambda _: True)
        if pid is None:
            return
        try:
            put_in_place(pid, descriptor_of(pid, ours, wanted.size), ours, held.let_in)
        except (OSError, LookupError, LivemoveError) as error:
            said.append(str(error))
        held.let_in()


def descriptor_of(pid: int, ours: int, size: int) -> int:
    """Under which number a process has the memfd that it has mapped to fill it, which is named and as large as ours.

    Raises ``LookupError`` if it is not just one."""
    name = str(Path(f"/proc/self/fd/{ours}").readlink())
    length = size + -size % PAGE_BYTES
    mapped = {
        each.inode
        for each in read_mappings(pid)
        if each.memfd is not None and each.name == name and each.end - each.start == length and not each.offset
    }
    if len(mapped) != 1:
        raise LookupError(f"process {pid} has mapped {len(mapped)} memfds of the name {name} and {length} bytes")
    numbers = Path(f"/proc/{pid}/fd").iterdir()
    found = [each for each in numbers if str(each.readlink()) == name and each.stat().st_ino in mapped]
    if len(found) != 1:
        raise LookupError(f"process {pid} has {len(found)} descriptors of the memfd {name}")
    return int(found[0].name)


def _restored(outer: dict[int, int], wanted: HandedOver) -> tuple[int, Mapping]:
    pid = outer.get(wanted.pid, 0)
    for mapping in read_mappings(pid) if pid else ():
        if mapping.start <= wanted.address < mapping.end and mapping.shared:
            return pid, mapping
    raise LookupError("it was not restored")


def _copy(ours: int, pid: int, mapping: Mapping) -> None:
    """Have the object that a process has mapped hold what ours does."""
    path = f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"
    theirs = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        size = os.fstat(ours).st_size
        _punch(theirs, 0, size + -size % PAGE_BYTES)
        for start, end in extents(ours, 0, size):
            at = start
            while at < min(end, size):
                at += os.pwrite(theirs, os.pread(ours, min(_COPY_BYTES, end - at), at), at)
    finally:
        os.close(theirs)


def _punch(descriptor: int, start: int, length: int) -> None:
    if _libc.fallocate(descriptor, _KEEP_SIZE | _PUNCH_HOLE, start, length):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
