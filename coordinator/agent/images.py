"""The image space of a migration: a tmpfs of its own, mode 0700, that holds images, hook and logs until the end.

Images are the whole memory of a service, so they never touch a disk and nobody else can read them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from coordinator.agent.other_processes import descriptors
from coordinator.agent.process import run
from coordinator.errors import NotEnoughSpace, ProtocolError

RUN_DIR = Path("/run/livemove")

#: CRIU's first image: a restore reads it before any other (criu/cr-restore.c, cr_restore_tasks).
INVENTORY = "inventory.img"


class ImageHold(Protocol):
    """Holds who reads the images at the first of them, until all are there."""

    def reached_by(self, pids: Iterable[int]) -> bool:
        """Whether one of these processes stands there."""

    def complete(self) -> None:
        """All are there: let them be read. Raises ``ProtocolError`` if the first is not."""

    def release(self) -> None:
        """Let go: who still waits reads an end of file. So does the kernel when the agent ends. Idempotent."""


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

    def names(self) -> set[str]:
        """The image files that are there."""

    def sizes(self, but: Container[str] = ()) -> dict[str, int]:
        """The image files but those in ``but``, by name, with their bytes. Some 5 µs for each, and 1 µs for those."""

    def size(self, name: str) -> int:
        """The bytes of one of them."""

    @property
    def written(self) -> Mapping[str, int]:
        """Those of them that ``write`` has made, as far as it has come in each: known without a look at the files."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes of an image from ``offset``."""

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Put bytes into an image at ``offset``; an empty write makes the file."""

    def hold(self) -> ImageHold:
        """From now on, hold who reads the images."""


class TmpfsImageSpace:
    """The real image space, a tmpfs at ``/run/livemove/<migration id>``."""

    def __init__(self, migration: str, run_dir: Path = RUN_DIR) -> None:
        self._base = run_dir / migration
        self.images = self._base / "images"
        self.work = self._base / "work"
        #: Where the first image is while who reads the images is held.
        self._aside = self._base / INVENTORY
        self.written: dict[str, int] = {}

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

    def names(self) -> set[str]:
        """See ``ImageSpace``."""
        with os.scandir(self.images) as entries:
            found = {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
        return found | {INVENTORY} if self._aside.is_file() else found

    def sizes(self, but: Container[str] = ()) -> dict[str, int]:
        """See ``ImageSpace``."""
        with os.scandir(self.images) as entries:
            wanted = (entry for entry in entries if entry.name not in but and entry.is_file())
            found = {entry.name: entry.stat().st_size for entry in wanted}
        if INVENTORY not in but and self._aside.is_file():
            found[INVENTORY] = self._aside.stat().st_size
        return found

    def size(self, name: str) -> int:
        """See ``ImageSpace``."""
        return os.stat(self._path(name)).st_size  # noqa: PTH116 - as ``_path``

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See ``ImageSpace``."""
        descriptor = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def write(self, name: str, offset: int, data: bytes) -> None:
        """See ``ImageSpace``. A name with a slash is refused: the other side must not write elsewhere."""
        if "/" in name or name in (".", ".."):
            raise ProtocolError(f"an image named {name!r} was sent")
        descriptor = os.open(self._path(name), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            end = offset + os.pwrite(descriptor, data, offset)  # less, where there is no room for all of it
        finally:
            os.close(descriptor)
        self.written[name] = max(self.written.get(name, 0), end)

    def hold(self) -> ImageHold:
        """See ``ImageSpace``."""
        inventory = self.images / INVENTORY
        if inventory.exists():
            inventory.rename(self._aside)
        return InventoryHold(inventory, self._aside)

    def _path(self, name: str) -> str:
        """Without a Path for each: there is an image for every connection."""
        return str(self._aside) if name == INVENTORY and (self.images / name).is_symlink() else f"{self.images}/{name}"


class InventoryHold:
    """A pipe of this agent in the place of CRIU's first image.

    A CRIU that has come as far as it can without images, with its libraries and what it knows of the kernel loaded,
    waits there for the content. If the agent ends, however it ends, there is an end of file to read, or no file: then
    the restore fails. (A FIFO would not do: to open one without a writer waits for ever; fifo(7). Opening a pipe
    through proc(5) does not.)"""

    def __init__(self, inventory: Path, aside: Path) -> None:
        self._inventory = inventory
        self._aside = aside
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC)
        inventory.symlink_to(f"/proc/{os.getpid()}/fd/{self._reader}")

    def reached_by(self, pids: Iterable[int]) -> bool:
        """See ``ImageHold``."""
        pipe = str(Path(f"/proc/self/fd/{self._reader}").readlink())
        return any(link == pipe for pid in pids for _, link in descriptors(pid))

    def complete(self) -> None:
        """See ``ImageHold``. Who has come through the link gets its content, who comes later finds the file."""
        if not self._aside.exists():
            raise ProtocolError(f"there is no {INVENTORY} among the images")
        os.write(self._writer, self._aside.read_bytes())  # some 100 bytes, and a pipe takes 64 KiB
        self._aside.rename(self._inventory)
        os.close(self._writer)
        self._writer = -1

    def release(self) -> None:
        """See ``ImageHold``. Until now who followed the link before the renaming may come."""
        if self._inventory.is_symlink():
            self._inventory.unlink()
        for descriptor in (self._reader, self._writer):
            if descriptor >= 0:
                os.close(descriptor)
        self._reader = self._writer = -1


def memory_available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """MemAvailable of proc(5) meminfo, in bytes: what can be allocated without swapping."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
