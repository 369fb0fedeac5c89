"""Memory of every kind a process can have, each page with contents of its own that can be checked after a move.

Contents are a function of what a page is and of a serial number that is used for one write only: a page that a
migration mixed up, lost or brought back from an earlier round differs from what its writer remembers. Mappings are
made, moved and taken away with the system calls themselves, because Python's own `mmap` hides most of that.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import mmap
import os
import random
import struct
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

PAGE_BYTES = mmap.PAGESIZE
MAYMOVE, FIXED, MADV_DONTNEED, MADV_REMOVE, MADV_DONTFORK = 1, 2, 4, 9, 10
IPC_PRIVATE, SHM_RDONLY = 0, 0o10000
_SERIALS_OF_ONE_PROCESS = 1 << 40
_HEADER = struct.Struct("=QQ")
#: Where a process tells of the pages that it found to be wrong.
NOTES = Path("/tmp/wrong-pages")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = _libc.shmat.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.shmget.argtypes = (ctypes.c_int, ctypes.c_size_t, ctypes.c_int)
_libc.shmat.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_libc.shmdt.argtypes = (ctypes.c_void_p,)
_FAILED = ctypes.c_void_p(-1).value

#: What a page holds that was never written: zeroes, or its part of a file.
Initial = Callable[[int], bytes]


def contents(key: int, serial: int) -> bytes:
    """What one write leaves in a page: says who wrote, and is damaged by any change."""
    header = _HEADER.pack(key, serial)
    unit = header + hashlib.blake2b(header, digest_size=64 - len(header)).digest()
    return unit * (PAGE_BYTES // len(unit))


def is_whole(page: bytes) -> bool:
    """Whether a page that somebody else wrote, or nobody, is one write's contents."""
    return page == contents(*_HEADER.unpack_from(page)) or not any(page)


def note(text: str) -> None:
    """For whoever looks for the reason: which page of what, what was written last, and what it holds."""
    with NOTES.open("a") as notes:
        notes.write(f"{os.getpid()}: {text}\n")


class Serials:
    """Serial numbers that no other process of the service uses."""

    def __init__(self, process: int = 0) -> None:
        self._numbers = itertools.count(process * _SERIALS_OF_ONE_PROCESS + 1)

    def __iter__(self) -> Iterator[int]:
        return self._numbers


def _zeroes(_: int) -> bytes:
    return bytes(PAGE_BYTES)


class Region:
    """Pages in a row, and what each of them must hold as far as this process is the one who writes it."""

    def __init__(self, name: int, address: int, pages: int, initial: Initial = _zeroes) -> None:
        self.address = address
        self.mine = range(pages)
        self.wrong = 0
        self._name = name << 32
        self._initial = initial
        self._serials = array("Q", bytes(8 * pages))

    @property
    def pages(self) -> int:
        """How many pages it has now."""
        return len(self._serials)

    def write(self, page: int, serials: Serials) -> None:
        """Check one page and rewrite it."""
        self.check(page)
        serial = self._serials[page] = next(iter(serials))
        ctypes.memmove(self.address + page * PAGE_BYTES, contents(self._name | page, serial), PAGE_BYTES)

    def check(self, page: int) -> None:
        """Count the page if it does not hold what was written last."""
        serial = self._serials[page]
        found = self.read(page)
        if found != (contents(self._name | page, serial) if serial else self._initial(page)):
            self.wrong += 1
            self._note(page, f"wrote {serial}", found)

    def check_all(self) -> None:
        """Check every page: those of others for being whole, which takes that nobody writes meanwhile."""
        for page in range(self.pages):
            if page in self.mine:
                self.check(page)
            elif not is_whole(found := self.read(page)):
                self.wrong += 1
                self._note(page, "others wrote", found)

    def _note(self, page: int, expected: str, found: bytes) -> None:
        kind = "zero" if not any(found) else "whole" if is_whole(found) else "torn"
        has = _HEADER.unpack_from(found)
        note(f"{self._name >> 32:#x} page {page} of {self.pages}, {expected}, has {has} ({kind})")

    def read(self, page: int) -> bytes:
        return ctypes.string_at(self.address + page * PAGE_BYTES, PAGE_BYTES)

    def punch(self, page: int) -> None:
        """Check a page of shared memory, give it back for all, and have an empty one come in."""
        self.check(page)
        _libc.madvise(self.address + page * PAGE_BYTES, PAGE_BYTES, MADV_REMOVE)
        self.reset(page, 1)
        self.check(page)

    def reset(self, first: int, pages: int) -> None:
        """These pages have been given back to the kernel."""
        for page in range(first, first + pages):
            self._serials[page] = 0

    def resize(self, pages: int) -> None:
        """There are so many pages now; new ones are untouched."""
        del self._serials[pages:]
        self._serials.extend([0] * (pages - self.pages))
        self.mine = range(pages)


def fresh_mapping(pages: int, flags: int = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, descriptor: int = -1) -> int:
    """The address of a new mapping."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    return _succeeded(_libc.mmap(None, pages * PAGE_BYTES, protection, flags, descriptor, 0))


def _succeeded(address: int | None) -> int:
    if address is None or address == _FAILED:
        raise OSError(ctypes.get_errno(), "the kernel made no mapping")
    return address


def private(name: int, pages: int) -> Region:
    """Private anonymous memory."""
    return Region(name, fresh_mapping(pages), pages)


def shared(name: int, pages: int) -> Region:
    """Shared anonymous memory."""
    return Region(name, fresh_mapping(pages, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS), pages)


class MemoryFile(Region):
    """A mapped memfd: every page is looked at through its descriptor too."""

    def __init__(self, name: int, pages: int) -> None:
        self.descriptor = os.memfd_create("regions")
        os.ftruncate(self.descriptor, pages * PAGE_BYTES)
        super().__init__(name, fresh_mapping(pages, mmap.MAP_SHARED, self.descriptor), pages)

    def check_all(self) -> None:
        super().check_all()
        for page in range(self.pages):
            if (found := os.pread(self.descriptor, PAGE_BYTES, page * PAGE_BYTES)) != self.read(page):
                self.wrong += 1
                self._note(page, "another by its descriptor", found)


class Segment(Region):
    """A System V segment, to be attached before it is used. Its address may be that of any of its attachments, which a
    child does not inherit."""

    def __init__(self, name: int, pages: int) -> None:
        super().__init__(name, 0, pages)
        self._id = int(_libc.shmget(IPC_PRIVATE, pages * PAGE_BYTES, 0o600))

    def attach(self, *, read_only: bool = False) -> int:
        """The address of one more attachment."""
        address = _succeeded(_libc.shmat(self._id, None, SHM_RDONLY if read_only else 0))
        _libc.madvise(address, self.pages * PAGE_BYTES, MADV_DONTFORK)
        return address

    def detach(self) -> None:
        """Give up the attachment whose address it has."""
        _libc.shmdt(self.address)


def of_file(name: int, most_pages: int) -> Region:
    """A private mapping of a file that every host has: the interpreter. Pages not written are the file's."""
    program = Path(sys.executable).resolve()
    pages = min(most_pages, program.stat().st_size // PAGE_BYTES)
    with program.open("rb") as file:
        address = fresh_mapping(pages, mmap.MAP_PRIVATE, file.fileno())

    def of_program(page: int) -> bytes:
        with program.open("rb") as file:
            return os.pread(file.fileno(), PAGE_BYTES, page * PAGE_BYTES)

    return Region(name, address, pages, of_program)


class Changing:
    """Mappings that come, grow, shrink, move and go, or whose pages are given back."""

    def __init__(self, name: int, most_pages: int) -> None:
        self._names = itertools.count(name << 16)
        self._most_pages = most_pages
        self._regions: list[Region] = []
        self._random = random.Random(name)
        self._wrong_before = 0

    @property
    def pages(self) -> int:
        return sum(region.pages for region in self._regions)

    @property
    def wrong(self) -> int:
        return self._wrong_before + sum(region.wrong for region in self._regions)

    def check_all(self) -> None:
        for region in self._regions:
            region.check_all()

    def change(self, serials: Serials) -> None:
        """Do one thing to one of the mappings, or make a new one."""
        if not self._regions or self.pages < self._most_pages // 2:
            self._make(serials)
            return
        region = self._random.choice(self._regions)
        change = self._random.choice((self._grow, self._shrink, self._move, self._give_back, self._remove))
        change(region, serials)

    def write(self, serials: Serials) -> None:
        """Rewrite a page somewhere."""
        if self._regions:
            region = self._random.choice(self._regions)
            region.write(self._random.randrange(region.pages), serials)

    def _make(self, serials: Serials) -> None:
        region = private(next(self._names), max(self._most_pages // 8, 2))
        self._regions.append(region)
        for page in range(0, region.pages, 2):
            region.write(page, serials)

    def _grow(self, region: Region, serials: Serials) -> None:
        if self.pages + region.pages // 2 <= self._most_pages:
            self._remap(region, region.pages * 3 // 2)
            region.write(region.pages - 1, serials)

    def _shrink(self, region: Region, _: Serials) -> None:
        pages = max(region.pages // 2, 1)
        _libc.munmap(region.address + pages * PAGE_BYTES, (region.pages - pages) * PAGE_BYTES)
        region.resize(pages)

    def _move(self, region: Region, _: Serials) -> None:
        self._remap(region, region.pages, target=fresh_mapping(region.pages))

    def _remap(self, region: Region, pages: int, target: int | None = None) -> None:
        """Resize, and move if there is a target."""
        before = region.pages * PAGE_BYTES
        flags = MAYMOVE if target is None else MAYMOVE | FIXED
        moved = _libc.mremap(region.address, before, pages * PAGE_BYTES, flags, target)
        region.address = _succeeded(moved)
        region.resize(pages)

    def _give_back(self, region: Region, _: Serials) -> None:
        pages = max(region.pages // 4, 1)
        first = self._random.randrange(region.pages - pages + 1)
        _libc.madvise(region.address + first * PAGE_BYTES, pages * PAGE_BYTES, MADV_DONTNEED)
        region.reset(first, pages)

    def _remove(self, region: Region, _: Serials) -> None:
        region.check_all()
        _libc.munmap(region.address, region.pages * PAGE_BYTES)
        self._forget(region)

    def _forget(self, region: Region) -> None:
        self._wrong_before += region.wrong
        self._regions.remove(region)
