"""The pattern service with files of every kind in /dev/shm, written in every way there is, and checked in every one.

Large files, written through mappings that keep no descriptor, that keep one, that come and go between two writes, and
by write(2) alone; holes; and small files, which are made, renamed and removed, and of which this service remembers what
they hold.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import socket
import stat
from pathlib import Path

from labs.programs import pattern_server
from labs.programs.ballast import PAGE_BYTES
from labs.programs.memory_regions import Region, Serials, fresh_mapping, note

FOLDER = Path("/dev/shm/files")
SMALL_FILES, UMASK = 20, 0o22

_libc = ctypes.CDLL(None, use_errno=True)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def _made(name: str, pages: int) -> int:
    descriptor = os.open(FOLDER / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
    os.ftruncate(descriptor, pages * PAGE_BYTES)
    return descriptor


class Mapped(Region):
    """Mapped, and closed."""

    def __init__(self, name: int, pages: int) -> None:
        descriptor = _made(f"mapped-{name}", pages)
        super().__init__(name, fresh_mapping(pages, mmap.MAP_SHARED, descriptor), pages)
        os.close(descriptor)


class Held(Region):
    """Mapped, with a descriptor: written through either of the two."""

    def __init__(self, name: int, pages: int) -> None:
        self._descriptor = _made(f"held-{name}", pages)
        super().__init__(name, fresh_mapping(pages, mmap.MAP_SHARED, self._descriptor), pages)

    def read(self, page: int) -> bytes:
        """By the descriptor, if the mapping shows the same."""
        found = os.pread(self._descriptor, PAGE_BYTES, page * PAGE_BYTES)
        return found if found == super().read(page) else b"\1" * PAGE_BYTES


class Passing(Held):
    """Mapped for each write, and for no longer."""

    def write(self, page: int, serials: Serials) -> None:
        """See `Region`."""
        length = self.pages * PAGE_BYTES
        self.address = fresh_mapping(self.pages, mmap.MAP_SHARED, self._descriptor)
        super().write(page, serials)
        _libc.munmap(self.address, length)

    def check_all(self) -> None:
        """See `Region`."""
        self.address = fresh_mapping(self.pages, mmap.MAP_SHARED, self._descriptor)
        super().check_all()
        _libc.munmap(self.address, self.pages * PAGE_BYTES)


class Written(Region):
    """Never mapped: pages are written with write(2), by somebody who may only write."""

    def __init__(self, name: int, pages: int) -> None:
        super().__init__(name, 0, pages)
        self._path = FOLDER / f"written-{name}"
        os.close(_made(self._path.name, pages))
        self._descriptor = os.open(self._path, os.O_WRONLY)
        self._buffer = fresh_mapping(1)

    def write(self, page: int, serials: Serials) -> None:
        """See `Region`."""
        self.address = self._buffer - page * PAGE_BYTES
        ctypes.memmove(self._buffer, self.read(page), PAGE_BYTES)
        super().write(page, serials)
        os.pwrite(self._descriptor, ctypes.string_at(self._buffer, PAGE_BYTES), page * PAGE_BYTES)

    def read(self, page: int) -> bytes:
        """By a descriptor of its own."""
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            return os.pread(descriptor, PAGE_BYTES, page * PAGE_BYTES)
        finally:
            os.close(descriptor)


class SmallFiles:
    """Files that come and go, with what each of them must be."""

    def __init__(self) -> None:
        self.wrong = 0
        self._random = random.Random(0)
        self._serial = 0
        self._files: dict[str, tuple[str, int, int]] = {}  # by name: text, mode, links
        self._removed = os.open(FOLDER / "removed", os.O_RDWR | os.O_CREAT)
        (FOLDER / "link").symlink_to("nowhere")
        os.mkfifo(FOLDER / "fifo", 0o620)
        self._fifo = os.open(FOLDER / "fifo", os.O_RDWR | os.O_NONBLOCK)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(FOLDER / "socket"))
        self._log = (FOLDER / "log").open("a+")
        (FOLDER / "removed").unlink()

    def change(self) -> None:
        """Make one, write to it, rename it, give it a second name, or remove it."""
        self._serial += 1
        name = self._random.choice(sorted(self._files)) if self._files else ""
        text = f"{self._serial}\n" * 50
        os.pwrite(self._removed, text.encode(), 0)
        print(self._serial, file=self._log, flush=True)
        if len(self._files) < SMALL_FILES:
            self._make(f"small-{self._serial}", text)
            return
        if self._serial % 4 == 0:
            (FOLDER / name).rename(FOLDER / f"small-{self._serial}")
            self._files[f"small-{self._serial}"] = self._files.pop(name)
        elif self._serial % 4 == 1:
            self._make(name, text)
        else:
            (FOLDER / name).unlink()
            del self._files[name]

    def _make(self, name: str, text: str) -> None:
        mode = self._random.choice((0o600, 0o644, 0o4755))
        (FOLDER / name).write_text(text)
        (FOLDER / name).chmod(mode)
        self._files[name] = (text, mode, 1)

    def check(self) -> None:
        """Count what is not as it must be."""
        found = {each.name for each in FOLDER.iterdir() if each.name.startswith("small-")}
        self._expect(found == set(self._files), f"names {sorted(found ^ set(self._files))}")
        for name, (text, mode, links) in self._files.items():
            status = (FOLDER / name).stat()
            self._expect((FOLDER / name).read_text() == text, f"the content of {name}")
            self._expect((stat.S_IMODE(status.st_mode), status.st_nlink) == (mode, links), f"the mode of {name}")
        self._expect(str((FOLDER / "link").readlink()) == "nowhere", "the symbolic link")
        self._expect(stat.S_IMODE((FOLDER / "fifo").stat().st_mode) == 0o620 & ~UMASK, "the mode of the fifo")
        with (FOLDER / "fifo").open("w") as fifo:
            fifo.write("by its name")
        self._expect(os.read(self._fifo, 100) == b"by its name", "the fifo")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.sendto(b"by its name", str(FOLDER / "socket"))
        self._expect(self._socket.recv(100, socket.MSG_DONTWAIT) == b"by its name", "the socket")
        written = "".join(f"{number}\n" for number in range(1, self._serial + 1))
        self._expect((FOLDER / "log").read_text() == written, "the log")
        text = f"{self._serial}\n" * 50 if self._serial else ""
        self._expect(os.pread(self._removed, len(text), 0).decode() == text, "the removed file")
        self._expect(os.fstat(self._removed).st_nlink == 0, "that the removed file has no name")

    def _expect(self, fact: bool, what: str) -> None:
        if not fact:
            self.wrong += 1
            note(what)


class Files:
    """All of them, for `PatternServer` to carry."""

    def __init__(self, pages: int) -> None:
        FOLDER.mkdir(mode=0o750)
        share = pages // 8
        self._large = [Mapped(1, 4 * share), Held(2, share), Passing(3, share), Written(4, share), Mapped(5, share)]
        self._small = SmallFiles()
        self._serials = Serials()
        self._random = random.Random(1)
        self._grown = 0
        for region in self._large[:4]:
            for page in range(0, region.pages, 2):
                region.write(page, self._serials)

    @property
    def pages(self) -> int:
        return sum(region.pages for region in self._large)

    def dirty(self, pages: int) -> None:
        """Write here and there, and change a small file."""
        for _ in range(pages):
            region = self._random.choice(self._large)
            region.write(self._random.randrange(region.pages), self._serials)
        self._large[4].punch(self._random.randrange(self._large[4].pages))
        self._small.change()

    def check_all(self) -> int:
        """Look at everything; return how much was ever found to be wrong."""
        for region in self._large:
            region.check_all()
        self._small.check()
        return self._small.wrong + sum(region.wrong for region in self._large)


def main() -> None:
    options = pattern_server.arguments().parse_args()
    pages = options.memory_mb * pattern_server.MEGABYTE // PAGE_BYTES
    pattern_server.serve(options, lambda: Files(pages))


if __name__ == "__main__":
    main()
