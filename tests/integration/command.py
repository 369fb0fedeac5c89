"""The command `livemove` as an operator runs it on the lab's operator machine, and what it said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from labs.lab import Lab

#: Before a command that is to be interrupted: a shell has what it starts in the background ignore SIGINT, and that is
#: inherited by everything below, a test run included (env(1)). `livemove` itself does not mind.
INTERRUPTIBLE = ("env", "--default-signal=INT")

COMMAND_TIMEOUT_S = 120.0
LINE_TIMEOUT_S = 60.0
MIGRATION_FIELDS = {
    "id", "workload", "source", "destination", "outcome", "exit_code", "mode", "rounds", "phases", "freeze_ms",
    "total_ms", "bytes", "connections", "warnings", "error",
}  # fmt: skip
"""Exactly these: scripts read them."""


@dataclass(frozen=True)
class Said:
    """How a command ended: exit status, standard output, standard error."""

    status: int
    stdout: str
    stderr: str
    peak_kib: int

    @property
    def report(self) -> dict[str, Any]:
        """The one JSON object of `--json`: nothing else may be on standard output."""
        report = json.loads(self.stdout)
        assert isinstance(report, dict), self.stdout
        return report

    @property
    def code(self) -> str:
        """The code of the report's error."""
        return str((self.report.get("error") or {}).get("code"))


class Livemove:
    """A running `livemove`. Leaving it as a context ends it, if it still runs."""

    def __init__(self, lab: Lab, *arguments: str, config: Path | None = None) -> None:
        program = Path(sys.executable).with_name("livemove")
        self.argv = [str(program), "--config", str(config or lab.config_path), *arguments]
        state = {"XDG_STATE_HOME": str(lab.paths.directory / "state"), "COLUMNS": "200"}
        self.process: subprocess.Popen[str] = lab.machine("operator").popen(
            self.argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **state},
        )
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self._stdout = ""
        self._peak_kib = 0
        self._readers = [threading.Thread(target=read) for read in (self._read_stderr, self._read_stdout)]
        for reader in self._readers:
            reader.start()

    def said(self, words: str) -> str:
        """The first line on standard error with these words in it; waits for it, within bounds."""
        with self._news:
            self._news.wait_for(lambda: self._ended or self._find(words) is not None, LINE_TIMEOUT_S)
            line = self._find(words)
        assert line is not None, f"livemove never said {words!r}:\n" + "\n".join(self._lines)
        return line

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, as a terminal or a service manager does."""
        self.process.send_signal(number)

    def finish(self, timeout: float = COMMAND_TIMEOUT_S) -> Said:
        """Wait for its end."""
        end = time.monotonic() + timeout
        for reader in self._readers:
            reader.join(max(0.0, end - time.monotonic()))  # who waits for a process with a bound looks every 50 ms
        try:
            status = self.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.argv} did not end:\n" + "\n".join(self._lines)) from None
        for reader in self._readers:
            reader.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return Said(status, self._stdout, "\n".join(self._lines), self._peak_kib)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.finish()

    def _find(self, words: str) -> str | None:
        return next((line for line in self._lines if words in line), None)

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._peak_kib = max(self._peak_kib, peak_kib(self.process.pid))
            with self._news:
                self._lines.append(line.rstrip())
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def _read_stdout(self) -> None:
        assert self.process.stdout is not None
        self._stdout = self.process.stdout.read()


def livemove(lab: Lab, *arguments: str, config: Path | None = None) -> Said:
    """Run `livemove` to its end."""
    with Livemove(lab, *arguments, config=config) as command:
        return command.finish()


def migrate(lab: Lab, workload: str, to: str, *options: str, config: Path | None = None) -> Said:
    """Run `livemove migrate --json` to its end."""
    return livemove(lab, "migrate", workload, "--to", to, "--json", *options, config=config)


def peak_kib(pid: int) -> int:
    """The most resident memory that a process of this machine has had; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)
