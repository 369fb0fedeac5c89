"""The pattern service as the first process of a container in which much else goes on, of which it takes stock.

Threads; a child that is spoken to over pipes; a child in a session of its own on a terminal that the first process
holds, and one whose terminal still belongs to a job that has ended; a grandchild; files in a tmpfs and on a bind mount,
one of them deleted; a lock. Each counts, and `stock` says whether all still count from where they were.
`python3 -m labs.programs.household` takes the arguments of
`pattern_server`; stock is taken whenever the file `ask` on the bind mount appears, and put beside it.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

from labs.programs.ballast import Ballast
from labs.programs.pattern_server import MEGABYTE, arguments, detach_stdio, serve

DATA, SCRATCH = Path("/mnt"), Path("/tmp")
THREADS = 4
COUNT = "import sys\nfor n, line in enumerate(sys.stdin): print(n, flush=True)"


class Lingering:
    """A shell that takes its terminal back from a job that has ended only when it is spoken to: until then the terminal
    belongs to a group that has no processes any more."""

    def __init__(self) -> None:
        (asked, self._ask), (told, telling) = os.pipe(), os.pipe()
        child, self._master = pty.fork()
        if child == 0:
            self._shell(asked, telling)
        os.close(asked)
        os.close(telling)
        self._told = os.fdopen(told, "rb")
        self._told.readline()

    def say(self, line: bytes) -> bytes:
        """Have it read a line from its terminal, and repeat it; it then has another job that has ended."""
        os.write(self._master, line)
        os.write(self._ask, b"?")
        said = self._told.readline()
        self._told.readline()
        return said

    @staticmethod
    def _shell(asked: int, telling: int) -> None:
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        attributes = termios.tcgetattr(0)
        attributes[3] &= ~termios.ECHO
        termios.tcsetattr(0, termios.TCSANOW, attributes)
        while True:
            job = os.fork()
            if job == 0:
                signal.pause()
            os.setpgid(job, job)
            os.tcsetpgrp(0, job)
            os.kill(job, signal.SIGKILL)
            os.waitpid(job, 0)
            os.write(telling, b"between two jobs\n")
            os.read(asked, 1)
            os.tcsetpgrp(0, os.getpgrp())
            os.write(telling, os.read(0, 100))


class Household:
    """Everything, with how far each has counted."""

    def __init__(self) -> None:
        self._asked = 0
        detach_stdio()
        counting = [sys.executable, "-B", "-c", COUNT]
        self._piped = subprocess.Popen(counting, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        child, self._master = pty.fork()
        if child == 0:
            os.execv("/bin/sh", ["sh", "-c", "stty -echo; n=0; while read line; do echo $n; n=$((n+1)); done"])
        self._lingering = Lingering()
        self._grandchild = subprocess.Popen(["sh", "-c", "sleep 100000 & wait"])
        self._deleted = (SCRATCH / "deleted").open("w+b")
        (SCRATCH / "deleted").unlink()
        self._kept = (SCRATCH / "kept").open("w+b")
        self._locked = (DATA / "locked").open("a+b")
        fcntl.flock(self._locked, fcntl.LOCK_EX)
        self._ticks = [0] * THREADS
        for number in range(THREADS):
            threading.Thread(target=self._tick, args=(number,), daemon=True).start()

    def _tick(self, number: int) -> None:
        while True:
            self._ticks[number] += 1
            time.sleep(0.01)

    def stock(self) -> dict[str, Any]:
        """What each says, once more; all numbers go up by one from time to time, and ticks go on."""
        before = list(self._ticks)
        time.sleep(0.1)
        assert self._piped.stdin and self._piped.stdout
        print(file=self._piped.stdin, flush=True)
        os.write(self._master, b"\n")
        for file in (self._deleted, self._kept):
            file.write(b"x")
            file.flush()
        self._asked += 1
        return {
            "asked": self._asked,
            "threads": sum(now > then for now, then in zip(self._ticks, before, strict=True)),
            "piped": int(self._piped.stdout.readline()) + 1,
            "terminal": int(os.read(self._master, 100).decode().splitlines()[-1]) + 1,
            "lingering": int(self._lingering.say(b"%d\n" % self._asked)),
            "deleted": os.fstat(self._deleted.fileno()).st_size,
            "kept": (SCRATCH / "kept").stat().st_size,
            "children": sum(child.poll() is None for child in (self._piped, self._grandchild)),
            "seccomp": _status("Seccomp"),
            "no_new_privileges": _status("NoNewPrivs"),
            "files_limit": list(resource.getrlimit(resource.RLIMIT_NOFILE)),
            "read_only": bool(os.statvfs("/").f_flag & os.ST_RDONLY),
            "locked": _is_locked(DATA / "locked"),
        }

    def answer_for_ever(self) -> None:
        """Take stock whenever it is asked for."""
        while True:
            if (DATA / "ask").exists():
                (DATA / "ask").unlink()
                (DATA / "stock.new").write_text(json.dumps(self.stock()))
                (DATA / "stock.new").rename(DATA / "stock")
            time.sleep(0.02)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _is_locked(path: Path) -> bool:
    with path.open("a+b") as other:
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def main() -> None:
    household = Household()
    threading.Thread(target=household.answer_for_ever, daemon=True).start()
    options = arguments().parse_args()
    serve(options, lambda: Ballast(options.memory_mb * MEGABYTE))


if __name__ == "__main__":
    main()
