"""The image space of a migration: a tmpfs of its own, mode 0700, that holds images, hook and logs until the end.

Images are the whole memory of a service, so they never touch a disk and nobody else can read them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Protocol

from coordinator.agent.process import run
from coordinator.errors import NotEnoughSpace, ProtocolError

RUN_DIR = Path("/run/livemove")


class ImageSpace(Protocol):
    """Where CRIU's images of one migration are on one host."""

    @property
    def images(self) -> Path:
        """The folder CRIU writes to or reads from."""

    @property
    def work(self) -> Path:
        """The folder for hook and logs."""

    async def create(self, size_bytes: int) -> None:
        """Make the space, at most ``size_bytes`` large; raise ``NotEnoughSpace`` if the host has less free memory."""

    async def remove(self) -> None:
        """Remove it with all that is in it. Idempotent."""

    def sizes(self) -> dict[str, int]:
        """The image files, by name, with their bytes."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes of an image from ``offset``."""

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Put bytes into an image at ``offset``; an empty write makes the file."""


class TmpfsImageSpace:
    """The real image space, a tmpfs at ``/run/livemove/<migration id>``."""

    def __init__(self, migration: str, run_dir: Path = RUN_DIR) -> None:
        self._base = run_dir / migration
        self.images = self._base / "images"
        self.work = self._base / "work"

    async def create(self, size_bytes: int) -> None:
        """See ``ImageSpace``."""
        if (free := memory_available_bytes()) < size_bytes:
            raise NotEnoughSpace(f"images may need {size_bytes >> 20} MiB of memory, {free >> 20} MiB are free")
        self._base.mkdir(mode=0o700, parents=True, exist_ok=True)
        options = f"size={size_bytes},mode=0700,nosuid,nodev"
        (await run(["mount", "-t", "tmpfs", "-o", options, "livemove", str(self._base)])).checked()
        self.images.mkdir(mode=0o700)
        self.work.mkdir(mode=0o700)

    async def remove(self) -> None:
        """See ``ImageSpace``."""
        while self._base.is_mount():
            # Lazily: a CRIU that is held in doubt may have its log in there.
            (await run(["umount", "--lazy", str(self._base)])).checked()
        if self._base.exists():
            shutil.rmtree(self._base)
        if self._base.parent.exists() and not any(self._base.parent.iterdir()):
            self._base.parent.rmdir()

    def sizes(self) -> dict[str, int]:
        """See ``ImageSpace``."""
        return {entry.name: entry.stat().st_size for entry in os.scandir(self.images) if entry.is_file()}

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See ``ImageSpace``."""
        with (self.images / name).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)

    def write(self, name: str, offset: int, data: bytes) -> None:
        """See ``ImageSpace``. A name with a slash is refused: the other side must not write elsewhere."""
        if "/" in name or name in (".", ".."):
            raise ProtocolError(f"an image named {name!r} was sent")
        descriptor = os.open(self.images / name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(descriptor, data, offset)
        finally:
            os.close(descriptor)


def memory_available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """MemAvailable of proc(5) meminfo, in bytes: what can be allocated without swapping."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
