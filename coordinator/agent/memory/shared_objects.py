"""What shared memory holds, and whether it may have been changed past the page tables.

A process's page table tells neither: a page of a shared object may hold something and be mapped nowhere, and write(2)
or fallocate(2) on a memfd or a file of /dev/shm touches no mapping. So the object itself is asked, through
/proc/PID/map_files (proc(5)): its data extents by lseek(SEEK_DATA), and its times.

The times change with every write through a descriptor, and with most through a mapping (those that fault; mm/memory.c,
fault_dirty_shared_page). So once they changed, an object that can have a descriptor is dirty as a whole. Memory that
never has one, which is that of MAP_SHARED | MAP_ANONYMOUS and of System V, is changed through mappings only, and told
page for page as long as all who have mapped it are asked; so is a memfd whose descriptors are closed (``memfds``).
"""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass

from coordinator.agent.memory.base import PAGE_BYTES, Mapping
from coordinator.agent.memory.runs import Spans, intersection, normalise

#: File times advance in steps of a clock tick, at most 10 ms (CONFIG_HZ=100): a younger time says nothing yet.
_GRANULARITY_NS = 20_000_000


@dataclass(frozen=True, slots=True)
class ObjectState:
    """What a shared object held when it was looked at."""

    data: Spans  # addresses within the mapping
    times: tuple[int, int, int]  # mtime and ctime in ns, size in bytes
    settled: bool  # the times were old enough to show every later change
    only_mapped: bool  # nobody has a descriptor

    def same_as(self, earlier: ObjectState | None) -> bool:
        """Whether nothing but writes through mappings can have changed it since."""
        return earlier is not None and (self.only_mapped or (earlier.settled and earlier.times == self.times))


#: The data of whole objects, as offsets, by device and inode: for a look at several processes that all stand still.
DataOfObjects = dict[tuple[int, int], Spans]


def look_at(
    pid: int, mapping: Mapping, *, only_mapped: bool, frozen: DataOfObjects | None = None
) -> ObjectState | None:
    """State of the object under a shared mapping, or ``None`` if it cannot be told: then count it as changed.

    With ``frozen``, nobody can change it, and its data is asked for once only: 13 ms for a gigabyte."""
    try:
        descriptor = os.open(
            f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        )
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _GRANULARITY_NS
        if frozen is None:
            found = extents(descriptor, mapping.offset, mapping.offset + mapping.end - mapping.start)
        else:
            key = (status.st_dev, status.st_ino)
            if key not in frozen:
                frozen[key] = extents(descriptor, 0, status.st_size)
            found = frozen[key]
    except OSError:
        return None
    finally:
        os.close(descriptor)
    data = data_of(mapping, found)
    return ObjectState(data, (status.st_mtime_ns, status.st_ctime_ns, status.st_size), settled, only_mapped)


def data_of(mapping: Mapping, found: Spans) -> Spans:
    """What an object holds, as addresses within a mapping of it."""
    move = mapping.start - mapping.offset
    here = (mapping.offset, mapping.offset + mapping.end - mapping.start)
    return normalise((first + move, last + move) for first, last in intersection(found, [here]))


def extents(descriptor: int, position: int, end: int) -> Spans:
    """The data of a file between two offsets, in whole pages."""
    found: Spans = []
    while position < end:
        try:
            first = os.lseek(descriptor, position, os.SEEK_DATA)
            last = os.lseek(descriptor, first, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data beyond
                break
            raise
        if first >= end:
            break
        first -= first % PAGE_BYTES
        last += -last % PAGE_BYTES
        found.append((first, min(last, end + -end % PAGE_BYTES)))
        position = last
    return found


def memfd_device() -> int:
    """The device of every memfd, of all anonymous shared memory, and of System V segments (mm/shmem.c, shm_mnt)."""
    memory = os.memfd_create("device")
    try:
        return os.fstat(memory).st_dev
    finally:
        os.close(memory)
