"""The large files of a workload's tmpfs mounts: which of their pages the destination does not have.

A file of a tmpfs is written to in two ways, and each of them is told:

- *through a mapping*: by the page table of who has it mapped, as for anonymous shared memory (``tree``), if he still is
  there and still has it mapped;
- *past the mappings*: write(2), ftruncate(2), fallocate(2), a punched hole, splice(2) and the like, and every opening
  of the file, are told by fanotify, whoever does it (``file_events``). It does not say where; so the file is dirty as a
  whole.

What is told by neither is a mapping that was made from a descriptor and is gone before the next look. It takes a
descriptor that can read and write (mmap(2)). So a file is *closed* in a look if no process of the tree had such a
descriptor when it began, none was on its way in a message between them, and nobody outside has one, or maps the file.
Until the next opening is told nobody can come by one, and page tables tell everything. A file that is not closed may
always be written to unseen. (Nor do its times tell: who has read a page of a tmpfs through a mapping may write to it
without a fault, mm/vma.c, vma_wants_writenotify.)

Where page tables do not tell everything, for whichever of these reasons, the file is *compared* from then on with what
was sent of it: when the rounds are over, and when all are frozen (``sent_digests``). To begin with it is sent anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from coordinator.agent.memory import holders
from coordinator.agent.memory.base import Backing, Mapping, PageRun, ProcessChanges
from coordinator.agent.memory.file_events import FileEvents
from coordinator.agent.memory.runs import Spans, count_pages, difference, intersection, normalise, union
from coordinator.agent.memory.sent_digests import SentDigests
from coordinator.agent.memory.shared_objects import extents

#: A file, by its device as in maps (proc(5)) and its inode.
Key = tuple[str, int]

#: What the link of a descriptor in /proc shows when it is open for reading and for writing (fs/proc/fd.c).
_READS_AND_WRITES = 0o600


@dataclass(slots=True)
class File:
    """One file, open for reading. ``number`` is below zero, and the destination's for it."""

    key: Key
    number: int
    descriptor: int
    watched: bool
    #: Pages that the destination has, as offsets; and those of them that are as they were, as far as is known.
    there: Spans = field(default_factory=list)
    right: Spans = field(default_factory=list)
    #: Found by the last look: what the destination does not have, what it has too much, and what there is.
    wanted: Spans = field(default_factory=list)
    too_much: Spans = field(default_factory=list)
    data: Spans = field(default_factory=list)
    told: bool = True  # something was told of it in the last look
    met: bool = False  # not for the first time
    #: What was sent of it, if it is compared.
    digests: SentDigests | None = None
    closed: bool = False
    nobody_outside: bool = False
    mapped: frozenset[tuple[int, int, Mapping]] = frozenset()

    def read(self, spans: Spans, step: int) -> Iterator[tuple[int, bytes]]:
        """Content to be sent, in whole pages, at most ``step`` bytes at once: offset and bytes."""
        for start, end in spans:
            for at in range(start, end, step):
                content = self._read_at(at, min(step, end - at)).ljust(min(step, end - at), b"\0")
                if self.digests is not None:
                    self.digests.note(at, content)
                yield at, content

    def _read_at(self, offset: int, length: int) -> bytes:
        return os.pread(self.descriptor, length, offset)

    def begin_comparing(self) -> None:
        """Once: what was sent without a digest is sent again. Before anything was sent nothing was written unseen."""
        if self.met and self.digests is None:
            self.right, self.digests = [], SentDigests()

    def compare(self) -> None:
        """Find what was written unseen. Blocks for as long as it takes to read it all (``sent_digests``)."""
        if self.digests is not None:
            unseen = self.digests.differing(self._read_at, intersection(self.right, self.data))
            self.right = difference(self.right, unseen)

    def sent(self) -> None:
        """The destination has what it wanted, and no more."""
        self.there = union(difference(self.there, self.too_much), self.wanted)
        self.right = union(difference(self.right, self.too_much), self.wanted)
        self.wanted, self.too_much = [], []


class Files:
    """The large files of one workload. A look begins with ``begin`` and ends with ``take``; used by one thread at a
    time. ``close`` it."""

    def __init__(self) -> None:
        """Raises ``OSError`` (see ``FileEvents``)."""
        self._events = FileEvents()
        self._files: dict[Key, File] = {}
        #: The first is far from the numbers of other shared objects (``shared``).
        self._next = -(1 << 24)
        self._held: frozenset[Key] | None = None

    @property
    def files(self) -> dict[Key, File]:
        """All that there are."""
        return self._files

    def begin(self, found: dict[Key, Callable[[], int]], pids: Iterable[int], *, compare: bool = False) -> list[int]:
        """Begin a look at the files that there are, each with what opens it for reading; returns the numbers of those
        that are gone. ``compare``: the rounds are over, or the workload is frozen.

        Takes some 3 µs for each descriptor of the processes, if there is a file."""
        gone = [key for key in self._files if key not in found]
        numbers = [self._files[key].number for key in gone]
        for key in gone:
            self._leave(self._files.pop(key))
        for key, opens in found.items():
            if key not in self._files:
                with suppress(FileNotFoundError):  # gone already
                    self._meet(key, opens())
        self._hear()
        self._held = holders.held_by(pids, self._of_descriptor) if self._files else None
        for file in self._files.values():
            file.data = extents(file.descriptor, 0, os.fstat(file.descriptor).st_size)
            if compare:
                file.compare()
        return numbers

    def take(self, answers: Iterable[ProcessChanges], pids: Iterable[int], *, last: bool) -> None:
        """End a look, with what all processes have answered after it began, which were told of all these files."""
        changed = list(answers)
        others_wrote = any(each.others_wrote for each in changed)
        seen = _seen(changed, self._files)
        for key, file in self._files.items():
            mapped = frozenset((each.pid, each.started, mapping) for each, mapping in seen.get(key, ()))
            lost = file.mapped - mapped or any(mapping.backing is not Backing.SHMEM for *_, mapping in mapped)
            unseen = file.told or others_wrote or lost or not (file.closed and self._is_free(key))
            if unseen:
                file.begin_comparing()
            for each, mapping in seen.get(key, ()):
                runs = (*each.changes.dirty, *each.changes.dropped)
                file.right = difference(file.right, _offsets(mapping, runs))
            file.mapped = mapped
        if not last:
            self._close(pids)
        for file in self._files.values():
            file.wanted = difference(file.data, file.right)
            file.too_much = difference(file.there, file.data)

    def _close(self, pids: Iterable[int]) -> None:
        """Find out which files are closed in this look."""
        for key, file in self._files.items():
            file.closed = file.watched and self._is_free(key)
            file.nobody_outside &= file.closed and not file.told
        doubtful = [file for file in self._files.values() if file.closed and not file.nobody_outside]
        if doubtful:
            outside = holders.held_outside(pids, self._of_descriptor, self._of_mapping)
            for file in doubtful:
                file.nobody_outside = file.key not in outside
        for file in self._files.values():
            file.closed &= file.nobody_outside
            file.met = True
            if not file.closed:
                file.begin_comparing()

    def _is_free(self, key: Key) -> bool:
        """Whether nobody in the tree could have mapped the file when this look began. (That somebody can now who could
        not in the look before is mostly told, but for a descriptor that was on its way while they were looked up.)"""
        return self._held is not None and key not in self._held

    @property
    def dirty_pages(self) -> int:
        """How many pages are wanted, by the last look."""
        return sum(count_pages(file.wanted) for file in self._files.values())

    def stop(self) -> None:
        """The move is over: a look that is under way, in another thread, ends soon."""
        for file in list(self._files.values()):
            if file.digests is not None:
                file.digests.stop()

    def close(self) -> None:
        """Idempotent."""
        for file in self._files.values():
            os.close(file.descriptor)
        self._files.clear()
        self._events.close()

    def _meet(self, key: Key, descriptor: int) -> None:
        watched = False
        with suppress(OSError):  # there are too many already: it is dirty in every look
            self._events.add(descriptor)
            watched = True
        self._files[key] = File(key, self._next, descriptor, watched)
        self._next -= 1

    def _leave(self, file: File) -> None:
        self._events.remove(file.descriptor)
        os.close(file.descriptor)

    def _hear(self) -> None:
        told = self._events.take()
        keys = None if told is None else {(device_name(device), inode) for device, inode in told}
        for key, file in self._files.items():
            file.told = not file.watched or keys is None or key in keys

    def _of_descriptor(self, pid: int, number: str, link: str) -> Key | None:
        """The file that a descriptor can map for writing."""
        path = f"/proc/{pid}/fd/{number}"
        if not link.startswith("/") or os.lstat(path).st_mode & _READS_AND_WRITES != _READS_AND_WRITES:
            return None
        status = os.stat(path)  # noqa: PTH116 - there may be thousands
        key = (device_name(status.st_dev), status.st_ino)
        return key if key in self._files else None

    def _of_mapping(self, mapping: Mapping) -> Key | None:
        return mapping.shared_object if mapping.shared_object in self._files else None


def device_name(device: int) -> str:
    """A device as in maps (proc(5))."""
    return f"{os.major(device):02x}:{os.minor(device):02x}"


def _seen(answers: Iterable[ProcessChanges], files: Iterable[Key]) -> dict[Key, list[tuple[ProcessChanges, Mapping]]]:
    """Who has which of the files mapped for all."""
    wanted = frozenset(files)
    found: dict[Key, list[tuple[ProcessChanges, Mapping]]] = {}
    for each in answers:
        for mapping in each.changes.mappings:
            if (key := mapping.shared_object) in wanted and key is not None:
                found.setdefault(key, []).append((each, mapping))
    return found


def _offsets(mapping: Mapping, runs: Iterable[PageRun]) -> Spans:
    """Those of the runs that are in a mapping, as offsets within the file."""
    shift = mapping.offset - mapping.start
    return normalise(
        (max(run.start, mapping.start) + shift, min(run.end, mapping.end) + shift)
        for run in runs
        if run.start < mapping.end and run.end > mapping.start
    )
