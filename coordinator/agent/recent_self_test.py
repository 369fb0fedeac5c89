"""Remembers for an hour that the self-test succeeded, so that moves in a row do not repeat it.

It takes a second of two processors, and says the same until the host boots or gets another CRIU. A failure is not
remembered: whoever mends it sees that at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path

from coordinator.agent.memory.ptrace import status_field
from coordinator.agent.selftest import self_test
from coordinator.protocol import SelfTestResult

FILE = Path("/var/cache/livemove/self-test.json")


async def recent_self_test(
    max_age_s: float, file: Path = FILE, test: Callable[[], Awaitable[SelfTestResult]] = self_test
) -> SelfTestResult:
    """The result of a self-test that is at most ``max_age_s`` old, and of this very system; a new one if there is
    none."""
    system, now = _system(), time.clock_gettime(time.CLOCK_BOOTTIME)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(file.read_text())
        if known["system"] == system and 0 <= now - known["at_s"] <= max_age_s:
            return SelfTestResult(**known["result"])
    result = await test()
    with contextlib.suppress(OSError):
        if result.ok:
            _write(file, json.dumps({"system": system, "at_s": now, "result": asdict(result)}))
        else:
            file.unlink(missing_ok=True)
    return result


def _system() -> list[object]:
    """What a result depends on: the kernel that runs since this boot, CRIU's file, our capabilities, our own code."""
    criu = Path(shutil.which("criu") or "/").resolve()
    status = criu.stat()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    capabilities = status_field(os.getpid(), "CapEff")
    return [boot, str(criu), status.st_size, status.st_mtime_ns, status.st_ino, capabilities, __file__]


def _write(file: Path, text: str) -> None:
    """Whole or not at all: another agent may read it."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        draft.write_text(text)
        draft.rename(file)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
