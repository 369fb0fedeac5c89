"""The destination's side of tmpfs mounts that come outside of CRIU's images (``tmpfs_source``).

Each is a tmpfs of our own, mounted where nobody else looks, below the image space: with that it is unmounted, however
the move ends. Its large files come first, page by page, and have no name until the list of names is here, in the
freeze. CRIU binds the mount into the restored workload, which keeps the file system when we unmount it.

The memory counts as used by the control group of the agent that has written it, not as the container's.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from coordinator.agent.memory.tmpfs_entries import Maker
from coordinator.agent.memory.tmpfs_files import device_name
from coordinator.agent.memory.tmpfs_mounts import limits, mounted, roomier
from coordinator.agent.memory.tmpfs_source import cookie
from coordinator.agent.messages import TmpfsEntries, TmpfsMount
from coordinator.errors import ProtocolError, RestoreFailed

#: include/uapi/linux/mount.h. CRIU gives its bind the flags of the mount on the source.
_NOSUID, _NODEV, _REMOUNT, _PRIVATE = 0x2, 0x4, 0x20, 1 << 18

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)


@dataclass(slots=True)
class _Mount:
    path: Path
    about: TmpfsMount
    root: int
    maker: Maker
    complete: bool = False


class ReceivedTmpfs:
    """The tmpfs mounts of one migration. ``close`` it; the mounts are unmounted with the image space, whose deed is
    recorded before it is made."""

    def __init__(self, pages: Callable[[int], int]) -> None:
        """``pages``: the descriptor of a file that was made here, by its number."""
        self._pages = pages
        self._mounts: dict[int, _Mount] = {}

    def make(self, folder: Path, message: TmpfsMount) -> None:
        """Mount one in a folder of the image space. Raises ``OSError``."""
        path = folder / f"tmpfs-{message.mount}"
        path.mkdir(mode=0o700)
        _mount(path, _NOSUID | _NODEV, roomier(message.options), message.source)
        _mount(path, _PRIVATE)
        root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._mounts[message.mount] = _Mount(path, message, root, Maker(root, self._pages))

    def file(self, mount: int) -> int:
        """The descriptor of a new file without a name (open(2), O_TMPFILE)."""
        return os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=self._of(mount).root)

    def put(self, message: TmpfsEntries, payload: bytes) -> None:
        """Make what is on a list; with the last one the mount is as it is on the source."""
        mount, length = self._of(message.mount), message.sizes[0]
        mount.maker.put(payload[:length], memoryview(payload)[length:])
        if message.complete:
            mount.maker.finish()
            if wanted := limits(mount.about.options):
                _mount(mount.path, _REMOUNT | _NOSUID | _NODEV, wanted)
            mount.complete = True

    @property
    def external(self) -> tuple[str, ...]:
        """What CRIU is told at the restore (criu(8), --external)."""
        return tuple(f"mnt[{cookie(number)}]:{mount.path}" for number, mount in self._mounts.items())

    def check(self, root_pid: int) -> None:
        """The tasks are restored and held: they have our mounts. Raises ``RestoreFailed`` where they do not."""
        theirs = mounted(Path(f"/proc/{root_pid}/mountinfo").read_text()) if self._mounts else {}
        for mount in self._mounts.values():
            point, device = mount.about.point, device_name(os.fstat(mount.root).st_dev)
            if not mount.complete or theirs.get(point) != device:
                raise RestoreFailed(f"the tmpfs at {point} was not restored as it was copied")

    def close(self) -> None:
        """Idempotent."""
        for mount in self._mounts.values():
            os.close(mount.root)
        self._mounts.clear()

    def _of(self, number: int) -> _Mount:
        if number not in self._mounts:
            raise ProtocolError(f"a tmpfs of the number {number} was not announced")
        return self._mounts[number]


def _mount(path: Path, flags: int, options: str = "", source: str = "tmpfs") -> None:
    if _libc.mount(os.fsencode(source), os.fsencode(path), b"tmpfs", flags, options.encode()):
        raise OSError(ctypes.get_errno(), f"mounting a tmpfs ({options}): {os.strerror(ctypes.get_errno())}")
