"""A real client of the lab's game, whose screen is a file: Nexuiz under a virtual display, drawn by the processor.

It runs in the clients machine's network over a Debian root that has it (package set `nexuiz-client`), in namespaces of
its own that end with it.
"""

from __future__ import annotations

import shlex
import struct
import subprocess
import tempfile
import time
import zlib
from pathlib import Path
from types import TracebackType
from typing import Self

from labs import root
from labs.catalogue.base import Service
from labs.commands import LabError
from labs.lab import Lab

PACKAGES = "nexuiz-client"
NAME = "witness"
WIDTH, HEIGHT = 512, 384
JOIN_TIMEOUT_S = 180.0
SHOWN = "CL_SignonReply: 4"
"""What a client says, as `developer` has it do, when it shows the game for the first time (its cl_parse.c)."""

CHANGES, LOOK_EVERY_S = 5, 1.0
"""It stands still at times while it loads its pictures; a screen that is another at every look is that of the game."""

# $0: the root; $1: a directory for the rest, in which `screen` is there; then what is run.
IN_ROOT = """\
root=$0 place=$1
shift
mkdir "$place/rest"
mount -t tmpfs tmpfs "$place/rest"
cd "$place/rest"
mkdir upper work root
mount -t overlay -o "lowerdir=$root,upperdir=upper,workdir=work" overlay root
mkdir -p root/run/screen root/tmp/.X11-unix
mount --bind "$place/screen" root/run/screen
mount --rbind /dev root/dev
mount -t proc proc root/proc
exec chroot root "$@"
"""
PLAY = """\
Xvfb :7 -screen 0 {width}x{height}x24 -fbdir /run/screen -nolisten tcp &
until [ -S /tmp/.X11-unix/X7 ]; do sleep 0.1; done
export DISPLAY=:7 HOME=/root PATH=/usr/games:/usr/bin:/bin LIBGL_ALWAYS_SOFTWARE=1
exec nexuiz {options}
"""
SETTINGS = {
    "vid_fullscreen": 0,
    "vid_width": WIDTH,
    "vid_height": HEIGHT,
    "_cl_name": NAME,
    "cl_maxfps": 15,
    "shownetgraph": 1,
    "developer": 1,
    "con_notify": 0,
}


class RealClient:
    """The client in the game, until `close`, or until it is left as a context."""

    def __init__(self, lab: Lab, service: Service, said: Path) -> None:
        """Start it; return when it shows the game. `said`: the file with what the server says."""
        self._said = said
        self._folder = tempfile.TemporaryDirectory(prefix="livemove-lab-client-")
        self._screen = Path(self._folder.name, "screen", "Xvfb_screen0")
        self._screen.parent.mkdir()
        self._log = Path(self._folder.name, "log")
        words = [word for name, value in SETTINGS.items() for word in (f"+{name}", str(value))]
        options = shlex.join(["-nosound", *words, "+connect", f"{service.address}:{service.port}"])
        play = PLAY.format(width=WIDTH, height=HEIGHT, options=options)
        inside = ["sh", "-ec", IN_ROOT, str(root.ensure(PACKAGES)), self._folder.name, "sh", "-ec", play]
        with self._log.open("w") as log:
            self._process: subprocess.Popen[bytes] = lab.machine("clients").popen(
                ["unshare", "--mount", "--pid", "--fork", "--kill-child", *inside],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._join()
        except BaseException:
            self.close()
            raise

    def _join(self) -> None:
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while SHOWN not in (log := self._log.read_text(errors="replace")):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise LabError(f"the real client did not join:\n{log[-1000:]}")
            time.sleep(LOOK_EVERY_S)
        before, changes = b"", 0
        while changes < CHANGES and time.monotonic() < deadline:
            now = self._screen.read_bytes()
            before, changes = now, changes + 1 if now != before else 0
            time.sleep(LOOK_EVERY_S)

    @property
    def plays(self) -> bool:
        """Whether it still runs, and the server has it in the game."""
        said = self._said.read_text(errors="replace")
        return self._process.poll() is None and f"{NAME} connected" in said and f"{NAME} disconnected" not in said

    def picture(self, path: Path) -> None:
        """Write what is on its screen now, as a PNG file."""
        path.write_bytes(png(*screen(self._screen.read_bytes())))

    def close(self) -> None:
        """End it, and leave nothing. May be repeated."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def screen(dump: bytes) -> tuple[int, int, bytes]:
    """Width, height and pixels (three bytes each: red, green, blue) of a screen that Xvfb keeps in a file.

    The format is XWDFile.h's: 25 numbers, a name, a table of colours, then lines of four bytes a pixel, blue first.
    """
    header = struct.unpack_from(">25I", dump)
    head_bytes, width, height, line_bytes, colours = (header[place] for place in (0, 4, 5, 12, 19))
    start = head_bytes + 12 * colours
    lines = [dump[start + y * line_bytes :][: width * 4] for y in range(height)]
    pixels = bytearray(width * height * 3)
    for place, blue_first in enumerate((2, 1, 0)):
        pixels[place::3] = b"".join(line[blue_first::4] for line in lines)
    return width, height, bytes(pixels)


KEPT_BITS = 0xF8
"""Of each colour: what is left out nobody sees, and the file is half as large."""


def png(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG file (RFC 2083); each line is stored as its difference to the one above (filter 2)."""
    coarse = pixels.translate(bytes(value & KEPT_BITS for value in range(256)))
    size, above, lines = width * 3, bytes(width * 3), []
    for start in range(0, len(coarse), size):
        line = coarse[start : start + size]
        lines.append(b"\2" + bytes((new - old) & 0xFF for new, old in zip(line, above, strict=True)))
        above = line
    head = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(b"".join(lines), 9)), (b"IEND", b""))
    made = b"\x89PNG\r\n\x1a\n"
    for kind, data in parts:
        made += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return made
