"""livemove as an operator runs it: the installed command, on the lab's operator machine."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from labs.commands import LabError
from labs.lab import Lab

MOVE_TIMEOUT_S = 180.0
ROLLBACK_TIMEOUT_S = 30.0
"""How long an interrupted livemove is given to put things back before it is killed."""


def migrate(
    lab: Lab,
    workload: str,
    destination: str,
    note: Callable[[str], None] = lambda _: None,
    *,
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """Run `livemove migrate --json`; pass its progress on, line by line; return its result object.

    When we are interrupted, so is livemove, once, and it is waited for: it rolls back.
    """
    livemove = Path(sys.executable).with_name("livemove")
    argv = [str(livemove), "--config", str(lab.config_path), "migrate", workload, "--to", destination, "--json"]
    argv += options
    # A session of its own: Ctrl-C on a terminal reaches us, and we pass it on, so that it comes once.
    process = lab.machine("operator").popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout and process.stderr
    with process, ThreadPoolExecutor(2) as readers:
        result = readers.submit(process.stdout.read)
        said = readers.submit(_pass_on, process.stderr, note)
        try:
            process.wait(MOVE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise LabError(f"livemove was not done after {MOVE_TIMEOUT_S:g} s: {shlex.join(argv)}") from None
        finally:
            _end(process)
    try:
        report = json.loads(result.result())
    except ValueError:
        report = None
    if not isinstance(report, dict):
        last = "\n".join(said.result()[-8:])
        raise LabError(f"no result (exit status {process.returncode}) from: {shlex.join(argv)}\n{last}".rstrip())
    return report


def _pass_on(stream: IO[str], note: Callable[[str], None]) -> list[str]:
    lines = []
    for line in stream:
        lines.append(line.rstrip())
        note(lines[-1])
    return lines


def _end(process: subprocess.Popen[str]) -> None:
    """Have livemove roll back if it still runs; kill it if it takes too long about it."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(ROLLBACK_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
