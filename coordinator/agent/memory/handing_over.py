"""The source's side of shared objects that reach the destination outside of CRIU's images.

CRIU writes a shared object into its images while the tasks are frozen, and reads it back before they run: some 3 ms for
each megabyte, both together. One whose pages were sent in the rounds it need not see: it is told that the object is
empty (``hidden_pages``), and CRIU's restore gets the destination's memfd in the place of its own (``shared_objects``
there: ``taking_over``).

What was written since the last round, and whatever else the object holds that the destination does not have, is read
here from the object itself, through /proc/PID/map_files (proc(5)): also what no process has mapped.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator

from coordinator.agent.channel import Channel
from coordinator.agent.memory.base import PAGE_BYTES, Mapping, ProcessChanges
from coordinator.agent.memory.page_messages import consecutive, dropped
from coordinator.agent.memory.runs import Spans, difference
from coordinator.agent.memory.shared import SharedMemory
from coordinator.agent.memory.shared_objects import extents
from coordinator.agent.messages import HandedOver, SharedObject
from coordinator.errors import TrackingFailed

_F_GET_SEALS, _F_SEAL_SEAL = 1034, 0x1  # include/uapi/linux/fcntl.h
_READ_BYTES = 1 << 20


class SharedFile:
    """A shared object, open for reading. Close it."""

    def __init__(self, pid: int, mapping: Mapping) -> None:
        """Raises ``OSError``."""
        path = f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> SharedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Once."""
        os.close(self._descriptor)

    @property
    def inode(self) -> int:
        """Which object it is."""
        return os.fstat(self._descriptor).st_ino

    @property
    def size(self) -> int:
        """In bytes; may end within a page."""
        return os.fstat(self._descriptor).st_size

    @property
    def sealable(self) -> bool:
        """Whether seals may be added to it (fcntl(2), F_ADD_SEALS). CRIU makes it again as it was (criu/memfd.c)."""
        return fcntl.fcntl(self._descriptor, _F_GET_SEALS) != _F_SEAL_SEAL

    def data(self) -> Spans:
        """The pages that are there, as offsets."""
        return extents(self._descriptor, 0, self.size)

    def read_at(self, offset: int, length: int) -> bytes:
        """So many bytes, or as many as there are."""
        return os.pread(self._descriptor, length, offset)

    def read(self, spans: Spans, step: int = _READ_BYTES) -> Iterator[tuple[int, bytes]]:
        """Their content, in whole pages, at most ``step`` bytes at once: offset and bytes."""
        for start, end in spans:
            for at in range(start, end, step):
                content = self.read_at(at, min(step, end - at))
                yield at, content.ljust(-(-len(content) // PAGE_BYTES) * PAGE_BYTES, b"\0")


def described(number: int, pid: int, mapping: Mapping) -> SharedObject:
    """What the destination has to know of an object to make one like it. Of one that is gone, nothing is right."""
    try:
        with SharedFile(pid, mapping) as file:
            return _described(number, mapping, file)
    except OSError:
        return SharedObject(number=number, name="", sealable=False)


def _described(number: int, mapping: Mapping, file: SharedFile) -> SharedObject:
    """Named as CRIU names it (criu/memfd.c, dump_one_memfd)."""
    name = mapping.name.removeprefix("/memfd:").removesuffix(" (deleted)")
    return SharedObject(number=number, name=name, sealable=file.sealable)


async def hand_over(
    link: Channel, shared: SharedMemory, inodes: Iterable[int], changed: Iterable[ProcessChanges]
) -> int:
    """The tasks are frozen, and CRIU's images have nothing of these objects: send what the destination does not have,
    and tell it that they are complete. Returns the bytes.

    Raises ``TrackingFailed`` if one cannot be read: what was hidden from CRIU cannot be committed then."""
    answers, sent = list(changed), 0
    for inode in inodes:
        try:
            sent += await _hand_over(link, shared, inode, answers)
        except (OSError, LookupError) as error:
            raise TrackingFailed(
                f"shared memory (inode {inode}) was kept out of the dump, and cannot be read: {error}",
                "`--mode post-copy` moves it with the images.",
            ) from error
    return sent


async def _hand_over(link: Channel, shared: SharedMemory, inode: int, answers: list[ProcessChanges]) -> int:
    each, mapping = shared.mapped_by(inode, answers)
    number = shared.number(mapping)
    sent = 0
    with SharedFile(each.pid, mapping) as file:
        await link.send(_described(number, mapping, file))
        data, size = file.data(), file.size
        whole = [(0, size + -size % PAGE_BYTES)]
        for at, content in file.read(difference(data, shared.sent(number))):
            await link.send(consecutive(number, at, content), content)
            sent += len(content)
        for message in dropped(number, difference(whole, data)):
            await link.send(message)
    image = f"pagemap-shmem-{inode}.img"
    await link.send(HandedOver(number=number, image=image, size=size, pid=each.inner_pid, address=mapping.start))
    return sent
