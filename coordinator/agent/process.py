"""The one door to subprocesses on a host.

Every command runs in a session of its own with no input, so that neither the agent's end nor a lost SSH session
takes it down: a CRIU that is held at its hook outlives us on purpose. A failure is told once, as a command that can be
pasted, its exit status, and the first line that explains.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.errors import CommandFailed, DeadlineExceeded

PIPE_BYTES = 256 * 1024
_HARMLESS = "Can't setup RLIMIT_NOFILE for self"


@dataclass(frozen=True, slots=True)
class Command:
    """A command line with what it adds to the environment."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        """The command as it can be pasted into a root shell."""
        prefix = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*prefix, shlex.join(self.argv)])


@dataclass(frozen=True, slots=True)
class Completed:
    """A command that ended, with its output."""

    command: Command
    status: int
    stdout: str
    stderr: str

    def checked(self) -> Completed:
        """Return self, or raise ``CommandFailed`` if the exit status is not 0."""
        if self.status != 0:
            raise CommandFailed(describe_failure(self.command, self.status, self.stderr or self.stdout))
        return self


class Running:
    """A command under way. One that holds tasks is never killed by us: it ends by itself, or by what its hook reads."""

    def __init__(self, command: Command, process: asyncio.subprocess.Process) -> None:
        self.command = command
        self._process = process

    @property
    def pid(self) -> int:
        """Process id of the command."""
        return self._process.pid

    def kill(self) -> None:
        """End it at once, if it has not ended: for helpers that may wait for what never comes."""
        if self._process.returncode is None:
            self._process.kill()

    async def wait(self) -> int:
        """Exit status; negative for a signal."""
        return await self._process.wait()


async def start(command: Command, output: Path, *, inherit: Sequence[int] = ()) -> Running:
    """Start a command whose output goes to the file ``output``; it inherits the descriptors ``inherit``."""
    _leave_stops_alone()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        process = await asyncio.create_subprocess_exec(
            *command.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            env={**os.environ, **command.environment},
            start_new_session=True,
            pass_fds=inherit,
        )
    except OSError as error:
        raise CommandFailed(f"{command}: {error.strerror}") from error
    finally:
        os.close(descriptor)
    return Running(command, process)


class Piped(Running):
    """A command that talks to us on its standard input and output, in bytes."""

    def __init__(self, command: Command, process: asyncio.subprocess.Process) -> None:
        super().__init__(command, process)
        self.reader = asyncio.StreamReader(limit=PIPE_BYTES)

    async def open(self, ours_in: int, ours_out: int) -> None:
        """Take our ends of the pipes."""
        loop = asyncio.get_running_loop()
        protocol = asyncio.StreamReaderProtocol(self.reader)
        self._read_end, _ = await loop.connect_read_pipe(lambda: protocol, os.fdopen(ours_in, "rb", 0))
        protocol = asyncio.StreamReaderProtocol(asyncio.StreamReader())
        transport, _ = await loop.connect_write_pipe(lambda: protocol, os.fdopen(ours_out, "wb", 0))
        self.writer = asyncio.StreamWriter(transport, protocol, None, loop)

    async def feed(self, data: bytes) -> None:
        """Write to its input, which ends with nothing. One that has ended takes no more."""
        if self.writer.transport.is_closing():
            return
        with contextlib.suppress(OSError):
            self.writer.write(data) if data else self.writer.close()
            await self.writer.drain()

    def close(self) -> None:
        """End it, if it has not ended, and close our ends. Idempotent."""
        self.kill()
        if not self.writer.transport.is_closing():
            self.writer.transport.abort()
        self._read_end.close()


async def start_piped(command: Command, folder: str, complaints: Path) -> Piped:
    """Start a command in ``folder`` with pipes for input and output; standard error goes to the file ``complaints``.

    Pipes, because a program may open its own again by way of /proc, which no socket can be."""
    _leave_stops_alone()
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    errors = os.open(complaints, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        process = await asyncio.create_subprocess_exec(
            *command.argv,
            stdin=theirs_in,
            stdout=theirs_out,
            stderr=errors,
            cwd=folder,
            env={**os.environ, **command.environment},
            start_new_session=True,
        )
    except OSError as error:
        os.close(ours_in)
        os.close(ours_out)
        raise CommandFailed(f"{command}: {error.strerror}") from error
    finally:
        for descriptor in (theirs_in, theirs_out, errors):
            os.close(descriptor)
    piped = Piped(command, process)
    await piped.open(ours_in, ours_out)
    return piped


def _leave_stops_alone() -> None:
    """Before Python 3.12 a thread waits for each child, with waitpid(2): of a child that another thread of ours traces
    (see ``criu_filter.py``) it would get the stops, and take them for its end."""
    if sys.version_info >= (3, 12):
        return
    watcher = asyncio.get_child_watcher()
    if not isinstance(watcher, asyncio.PidfdChildWatcher) or not watcher.is_active():
        watcher = asyncio.PidfdChildWatcher()
        watcher.attach_loop(asyncio.get_running_loop())
        asyncio.set_child_watcher(watcher)


async def run(
    argv: Sequence[str], *, deadline_s: float = 30.0, environment: Mapping[str, str] | None = None
) -> Completed:
    """Run a short command to its end; after ``deadline_s`` kill it, with what it started, and raise
    ``DeadlineExceeded``."""
    command = Command(tuple(argv), environment or {})
    _leave_stops_alone()
    try:
        process = await asyncio.create_subprocess_exec(
            *command.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **command.environment},
            start_new_session=True,
        )
    except OSError as error:
        raise CommandFailed(f"{command}: {error.strerror}") from error
    try:
        async with asyncio.timeout(deadline_s):
            stdout, stderr = await process.communicate()
    except TimeoutError as error:
        raise DeadlineExceeded(f"{command}: not finished after {deadline_s:g} s") from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started: the session is its own
            await process.wait()
    assert process.returncode is not None
    return Completed(command, process.returncode, stdout.decode(errors="replace"), stderr.decode(errors="replace"))


def describe_failure(command: Command, status: int, output: str) -> str:
    """One line for a failed command: what was run, how it ended, and the first line that explains it."""
    ending = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return f"{command}: {ending}: {first_explaining_line(output)}"


def first_explaining_line(output: str) -> str:
    """The first line with "error" in it (CRIU's later ones are consequences), else the last line.

    Without CAP_SYS_RESOURCE every CRIU begins with a harmless error about its own limits, which explains nothing."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and _HARMLESS not in line]
    for line in lines:
        if "error" in line.lower():
            return line
    return lines[-1] if lines else "no output"


def start_time(pid: int, proc: Path = Path("/proc")) -> int | None:
    """When a process started, in clock ticks since boot (field 22 of proc(5) stat): with the pid it names a process for
    ever. ``None`` if there is no such process or it is a zombie."""
    fields = stat_fields(pid, proc)
    return None if not fields or fields[0] == "Z" else int(fields[19])


def stat_fields(pid: int, proc: Path = Path("/proc")) -> list[str]:
    """What /proc/PID/stat says behind the command's name: first the state, field 3 of proc(5). Empty if there is no
    such process."""
    try:
        return (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


async def wait_gone(pid: int, started: int, deadline_s: float) -> bool:
    """Wait until the process with that pid and start time is gone, whoever its parent is; ``False`` on the deadline."""
    loop = asyncio.get_running_loop()
    until = loop.time() + deadline_s
    while start_time(pid) == started:
        if loop.time() >= until:
            return False
        await asyncio.sleep(0.02)
    return True
