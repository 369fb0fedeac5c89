"""The pattern service with books on disk, written in the ways that services have, and audited all the time.

A log that is appended to and synced; a file that is replaced by renaming another over it; one that is mapped and
written to without a call; one that was deleted while it is open; a unix socket. In every one is the same number, which
is also in memory. `python3 -m labs.programs.bookkeeper` takes the arguments of `pattern_server` and keeps its books in
/mnt, or with `--books DIR` there; with `--furnish DIR` it puts everything there that a file system can hold, and with
`--look DIR` it says what is there.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import socket
import stat
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

from labs.programs.ballast import Ballast
from labs.programs.pattern_server import MEGABYTE, arguments, daemonize, detach_stdio, serve

DATA = Path("/mnt")
PAUSE_S = 0.005
NUMBER = struct.Struct("<Q")
GHOST = bytes(range(256)) * 16384
"""4 MiB, which are in a deleted file: more than CRIU takes along unless it is told."""

PAGES = 16
#: An access control list (xattr of acl(5), version 2): owner rwx, user 1 rw, group r, mask rw, others nothing.
ACL = bytes.fromhex("02000000 01000700ffffffff 0200060001000000 04000400ffffffff 10000600ffffffff 20000000ffffffff")
#: What `--furnish` makes, and nobody changes.
STILL = "still"


class Books:
    """All books, and the number that is in each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._log = (folder / "log").open("a+b", buffering=0)
        with (folder / "mapped").open("w+b") as file:
            file.truncate(PAGES * mmap.PAGESIZE)
            self._mapped = mmap.mmap(file.fileno(), 0)
        self._deleted = (folder / "deleted").open("w+b", buffering=0)
        self._deleted.write(GHOST)
        (folder / "deleted").unlink()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(folder / "socket"))
        self._socket.listen()

    def entry(self) -> None:
        """Write the next number everywhere."""
        self._number += 1
        number = NUMBER.pack(self._number)
        self._log.write(number)
        os.fsync(self._log.fileno())
        (self._folder / "current.new").write_bytes(number)
        (self._folder / "current.new").rename(self._folder / "current")
        at = self._number % PAGES * mmap.PAGESIZE
        self._mapped[at : at + NUMBER.size] = number
        self._deleted.write(number)

    def audit(self) -> None:
        """Compare every book with memory, by what the file system says, and write down how many entries there are."""
        expected = b"".join(NUMBER.pack(n) for n in range(1, self._number + 1))
        mapped = {n % PAGES: n for n in range(max(1, self._number - PAGES + 1), self._number + 1)}
        content = (self._folder / "mapped").read_bytes()
        checks = {
            "log": (self._folder / "log").read_bytes() == expected,
            "current": (self._folder / "current").read_bytes() == NUMBER.pack(self._number),
            "mapped": all(NUMBER.unpack_from(content, page * mmap.PAGESIZE)[0] == n for page, n in mapped.items()),
            "deleted": os.pread(self._deleted.fileno(), len(GHOST) + len(expected) + 1, 0) == GHOST + expected,
            "socket": stat.S_ISSOCK((self._folder / "socket").stat().st_mode),
        }
        audit = {"entries": self._number, "wrong": [name for name, right in checks.items() if not right]}
        (self._folder / "audit.new").write_text(json.dumps(audit))
        (self._folder / "audit.new").rename(self._folder / "audit")

    def keep(self) -> None:
        """For ever."""
        while True:
            for _ in range(25):
                self.entry()
                time.sleep(PAUSE_S)
            self.audit()


def fill(root: Path) -> None:
    """Put everything there that a file system can hold."""
    (root / "folder/below").mkdir(parents=True)
    (root / "folder").chmod(0o2751)
    (root / "plain").write_bytes(os.urandom(300_000))
    (root / "owned").write_text("x")
    os.chown(root / "owned", 1234, 5678)
    (root / "owned").chmod(0o4755)
    for name in ("#comment", ";comment", "-option", " space", "new\nline", os.fsdecode(b"\xff\xfe"), "*", "ä"):
        (root / "folder" / name).write_text(ascii(name))
    os.link(root / "plain", root / "folder/linked")
    (root / "link").symlink_to("/nowhere/at all")
    os.mkfifo(root / "pipe")
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(root / "socket"))
    with (root / "sparse").open("wb") as file:
        file.seek(50 * MEGABYTE)
        file.write(b"end")
    os.setxattr(root / "owned", "user.colour", b"green")
    os.setxattr(root / "folder/below", "system.posix_acl_access", ACL)
    os.setxattr(root / "folder/below", "system.posix_acl_default", ACL)


def look(folder: Path) -> dict[str, list[Any]]:
    """All there is to know of each entry but inode numbers, for which the other names stand."""
    paths = [folder, *sorted(folder.rglob("*"))]
    about = {path: path.lstat() for path in paths}
    names: dict[int, list[str]] = {}
    for path, each in about.items():
        names.setdefault(each.st_ino, []).append(str(path.relative_to(folder)))
    return {
        ascii(str(path.relative_to(folder))): [*_facts(path, each), names[each.st_ino]] for path, each in about.items()
    }


def _facts(path: Path, about: os.stat_result) -> list[Any]:
    content = path.read_bytes() if stat.S_ISREG(about.st_mode) else b""
    target = str(path.readlink()) if path.is_symlink() else ""
    attributes = {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in _attribute_names(path)}
    size = about.st_size if stat.S_ISREG(about.st_mode) else 0
    digest = hashlib.sha256(content).hexdigest()
    sparse = about.st_blocks * 512 < size // 2
    owners = [about.st_mode, about.st_uid, about.st_gid, about.st_rdev]
    return [*owners, size, about.st_mtime_ns, digest, target, attributes, sparse]


def _attribute_names(path: Path) -> list[str]:
    names = os.listxattr(path, follow_symlinks=False)
    return [name for name in names if not name.startswith("trusted.overlay.")]


def main() -> None:
    if sys.argv[1:2] == ["--furnish"]:
        return fill(Path(sys.argv[2], STILL))
    if sys.argv[1:2] == ["--look"]:
        print(json.dumps(look(Path(sys.argv[2])), sort_keys=True))
        return None
    parser = arguments()
    parser.add_argument("--books", type=Path, default=DATA, help="the directory to keep them in")
    options = parser.parse_args()
    if options.daemon:  # first, because a thread does not come along into a child
        daemonize(options.pid_file)
        options.daemon, options.pid_file = False, None
    detach_stdio()
    threading.Thread(target=Books(options.books).keep, daemon=True).start()
    return serve(options, lambda: Ballast(options.memory_mb * MEGABYTE))


if __name__ == "__main__":
    main()
