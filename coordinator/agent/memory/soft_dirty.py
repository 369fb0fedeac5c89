"""The tracker for kernels with CONFIG_MEM_SOFT_DIRTY and without PAGEMAP_SCAN (Debian 12's 6.1, on x86-64 only).

The kernel sets a bit in a page's entry when the page is written (Documentation/admin-guide/mm/soft-dirty.rst). Reading
the bits (/proc/PID/pagemap, pagemap.rst) and clearing them (4 into clear_refs) are two steps, so the process is stopped
for both: unlike with ``write_protect`` it pauses in every round, for some ten milliseconds a gigabyte.

What the bit does not tell is dirty: shared memory (reclaim drops its entries and their bits), and private pages that
others have too (after fork, merged, or the zero page that reads of discarded memory bring in).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from coordinator.agent.memory.base import NOT_CLOSED, PAGE_BYTES, Changes, Closed, Mapping
from coordinator.agent.memory.mappings import read_mappings
from coordinator.agent.memory.ptrace import TargetGone
from coordinator.agent.memory.runs import (
    Spans,
    count_pages,
    difference,
    intersection,
    normalise,
    plain_runs,
    spans_of,
    to_runs,
    union,
)
from coordinator.agent.memory.shared_objects import DataOfObjects
from coordinator.agent.memory.snapshot import Asked, look_at_objects, trackable
from coordinator.agent.memory.syscall_injection import with_process_stopped
from coordinator.errors import TrackingFailed

_ENTRY_BYTES = 8
_READ_BYTES = 1 << 21

# The highest byte of an entry: present (bit 63), swapped (62), a file's or shared (61), guard (58), mapped only here
# (56).
_PRESENT, _SWAPPED, _OF_FILE, _GUARD, _ALONE = 0x80, 0x40, 0x20, 0x04, 0x01


def _is_held(top: int) -> bool:
    return not top & _GUARD and bool(top & _SWAPPED or (top & _PRESENT and not top & _OF_FILE))


def _table(wanted: Callable[[int], object]) -> bytes:
    """For ``bytes.translate``: 1 where wanted, else 0."""
    return bytes(bool(wanted(value)) for value in range(256))


_HELD = _table(_is_held)
_SHARED = _table(lambda top: bool(top & _PRESENT) and not top & (_ALONE | _SWAPPED))
_SOFT = _table(lambda seventh: seventh & 0x80)  # bit 55
_ONES = re.compile(rb"\x01+")


@dataclass(frozen=True, slots=True)
class Entries:
    """What page map entries say of the private pages of a range."""

    held: Spans
    dirty: Spans  # those among the held that were written, or of which it cannot be told


def parse_entries(data: bytes, start: int) -> Entries:
    """Entries of consecutive pages from the address ``start`` (pure). All pages at once: Python is too slow for
    each."""
    top = data[7::_ENTRY_BYTES]
    held = top.translate(_HELD)
    doubtful = _both(held, _either(data[6::_ENTRY_BYTES].translate(_SOFT), top.translate(_SHARED)))
    return Entries(_spans(held, start), _spans(doubtful, start))


def _either(left: bytes, right: bytes) -> bytes:
    return (int.from_bytes(left, "little") | int.from_bytes(right, "little")).to_bytes(len(left), "little")


def _both(left: bytes, right: bytes) -> bytes:
    return (int.from_bytes(left, "little") & int.from_bytes(right, "little")).to_bytes(len(left), "little")


def _spans(flags: bytes, start: int) -> Spans:
    return [(start + match.start() * PAGE_BYTES, start + match.end() * PAGE_BYTES) for match in _ONES.finditer(flags)]


def populated(smaps: str) -> Spans:
    """The mappings that hold any page, of /proc/PID/smaps: large reservations have entries to read, and nothing in
    them.

    A page that comes in right after is not known by then, and thus dirty in the next round."""
    found: Spans = []
    current: tuple[int, int] | None = None
    for line in smaps.splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            first, _, last = name.partition("-")
            current = (int(first, 16), int(last, 16))
        elif name in ("Rss:", "Swap:") and current is not None and rest.split()[0] != "0":
            found.append(current)
            current = None
    return normalise(found)


class SoftDirtyTracker:
    """Tracks one process (see ``Tracker``). Leaves nothing in it, but resets its soft-dirty bits, which nobody else may
    use meanwhile (CRIU's --track-mem does)."""

    def __init__(self, pid: int) -> None:
        """Raises ``TargetGone``. Nothing is done to the process yet."""
        self._pid = pid
        self._known: Spans = []
        self._lazy: Spans = []
        if not Path(f"/proc/{pid}/clear_refs").exists():
            raise TargetGone(f"process {pid} is gone")

    @property
    def pid(self) -> int:
        """See ``Tracker``."""
        return self._pid

    def close(self) -> None:
        """See ``Tracker``: there is nothing to remove."""

    def collect(
        self,
        *,
        last: bool = False,
        others_wrote: bool = False,
        closed: Closed = NOT_CLOSED,
        frozen: DataOfObjects | None = None,
    ) -> Changes:
        """See ``Tracker``. Shared memory is dirty in every answer, whoever wrote."""
        mappings = read_mappings(self._pid)
        if not mappings:
            raise TargetGone(f"process {self._pid} is gone")
        memory = trackable(mappings)
        private = [each for each in memory if not each.shared]
        wanted = self._populated(private)
        entries = self._read(wanted) if last else with_process_stopped(self._pid, lambda: self._read_and_clear(wanted))
        parsed = [parse_entries(data, start) for start, data in entries]
        shared = [each for each in memory if each.shared]
        data, _, _ = look_at_objects(self._pid, shared, {}, Asked(others_wrote=True, frozen=frozen))
        held = union(*(each.held for each in parsed), data)
        lazy = spans_of(each for each in mappings if each.lazy)
        new = union(difference(held, self._known), intersection(held, difference(lazy, self._lazy)))
        dirty = union(*(each.dirty for each in parsed), data, new)
        dropped = difference(self._known, held)
        self._known, self._lazy = held, lazy
        return Changes(to_runs(dirty, mappings), plain_runs(dropped), tuple(mappings), count_pages(held))

    def _populated(self, private: list[Mapping]) -> Spans:
        try:
            with_pages = set(populated(Path(f"/proc/{self._pid}/smaps").read_text(errors="replace")))
        except (FileNotFoundError, ProcessLookupError):
            raise TargetGone(f"process {self._pid} is gone") from None
        return [
            (each.start, each.end)
            for each in private
            if any(start <= each.start and each.end <= end for start, end in with_pages)
        ]

    def _read_and_clear(self, wanted: Spans) -> list[tuple[int, bytes]]:
        entries = self._read(wanted)
        try:
            Path(f"/proc/{self._pid}/clear_refs").write_text("4")
        except (FileNotFoundError, ProcessLookupError):
            raise TargetGone(f"process {self._pid} is gone") from None
        except OSError as error:
            raise TrackingFailed(f"process {self._pid}: its pages cannot be marked clean ({error.strerror})") from error
        return entries

    def _read(self, wanted: Spans) -> list[tuple[int, bytes]]:
        """The raw entries; they are parsed when the process runs again."""
        found: list[tuple[int, bytes]] = []
        try:
            with open(f"/proc/{self._pid}/pagemap", "rb", buffering=0) as pagemap:  # noqa: PTH123
                for start, end in wanted:
                    address = start
                    while address < end:
                        length = min(_READ_BYTES, (end - address) // PAGE_BYTES * _ENTRY_BYTES)
                        data = os.pread(pagemap.fileno(), length, address // PAGE_BYTES * _ENTRY_BYTES)
                        data = data[: len(data) // _ENTRY_BYTES * _ENTRY_BYTES]
                        if not data:
                            break
                        found.append((address, data))
                        address += len(data) // _ENTRY_BYTES * PAGE_BYTES
        except (FileNotFoundError, ProcessLookupError):
            raise TargetGone(f"process {self._pid} is gone") from None
        return found


def soft_dirty_available() -> bool:
    """Whether this kernel keeps soft-dirty bits: a page of our own is written, and looked at.

    Clears the marks of this process, which nobody else uses."""
    with mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        page[0] = 1
        try:
            before = _own_bit(page)
            Path("/proc/self/clear_refs").write_text("4")
            cleared = _own_bit(page)
            page[0] = 2
            return before and not cleared and _own_bit(page)
        except OSError:
            return False


def _own_bit(page: mmap.mmap) -> bool:
    anchor = ctypes.c_char.from_buffer(page)
    address = ctypes.addressof(anchor)
    del anchor
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:  # noqa: PTH123
        entry = os.pread(pagemap.fileno(), _ENTRY_BYTES, address // PAGE_BYTES * _ENTRY_BYTES)
    return bool(entry[6] & 0x80)
