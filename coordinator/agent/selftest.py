"""The host's own proof that its CRIU works: a small process with a TCP connection is dumped, restored, and goes on.

Neither CRIU's version nor ``criu check`` tells whether CRIU works on a kernel (there are versions that say "Looks good"
and then cannot dump any socket), so this does exactly what a move does, on the loopback interface.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

from coordinator.agent.process import Command, describe_failure, first_explaining_line, run, start, start_time
from coordinator.errors import LivemoveError
from coordinator.protocol import SelfTestResult

#: Counts the bytes it was sent, so that a restored copy proves that it is the same process with the same connection.
_SERVER = """
import os, socket, sys
listener = socket.create_server(("127.0.0.1", 0))
with open(sys.argv[1], "w") as file:
    file.write(str(listener.getsockname()[1]))
uid = int(sys.argv[2])
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
connection, _ = listener.accept()
count = 0
while data := connection.recv(100):
    count += len(data)
    connection.sendall(b"%d\\n" % count)
"""
_TIMEOUT_S = 20.0
_ROOT, _NOBODY = 0, 65534


async def self_test() -> SelfTestResult:
    """Dump and restore a process with a connection; what went wrong is in ``problem``, nothing is left behind."""
    if shutil.which("criu") is None:
        return SelfTestResult(ok=False, problem="criu is not installed")
    # Without CAP_SYS_RESOURCE CRIU can dump root's processes alone, unless something helps it: so that is tried.
    tried = await _test_as(_NOBODY)
    return tried if tried.ok else await _test_as(_ROOT)


async def _test_as(uid: int) -> SelfTestResult:
    try:
        async with AsyncExitStack() as cleanup:
            folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="livemove-selftest-", dir="/run")))
            return await asyncio.wait_for(_dump_and_restore(folder, uid, cleanup), _TIMEOUT_S)
    except TimeoutError:
        return SelfTestResult(ok=False, problem=f"not finished after {_TIMEOUT_S:g} s")
    except (LivemoveError, OSError) as error:
        return SelfTestResult(ok=False, problem=str(error))


async def _dump_and_restore(folder: Path, uid: int, cleanup: AsyncExitStack) -> SelfTestResult:
    port_file = folder / "port"
    images = folder / "images"
    images.mkdir()
    server = Command((sys.executable, "-I", "-S", "-c", _SERVER, str(port_file), str(uid)), {})
    running = await start(server, Path(os.devnull))
    cleanup.enter_context(_killed(running.pid))
    connection = await _connect(port_file)
    cleanup.callback(connection.close)
    if (problem := await _answer(connection, b"before", b"6\n")) is not None:
        return SelfTestResult(ok=False, problem=problem)
    began = time.monotonic()
    options = ("--images-dir", str(images), "--tcp-established", "--network-lock", "skip", "-v2")
    dump = ("criu", "dump", "--tree", str(running.pid), "--log-file", "dump.log", *options)
    if (problem := await _criu(dump, images / "dump.log")) is not None:
        return SelfTestResult(ok=False, problem=problem)
    await running.wait()
    dumped = time.monotonic()
    restore = ("criu", "restore", "--restore-detached", "--log-file", "restore.log", *options)
    if (problem := await _criu(restore, images / "restore.log")) is not None:
        return SelfTestResult(ok=False, problem=problem)
    cleanup.enter_context(_killed(running.pid))
    restored = time.monotonic()
    problem = await _answer(connection, b"after", b"11\n")
    return SelfTestResult(
        ok=problem is None,
        any_uid=problem is None and uid != _ROOT,
        problem=problem or "",
        dump_ms=round((dumped - began) * 1000, 1),
        restore_ms=round((restored - dumped) * 1000, 1),
    )


async def _criu(argv: tuple[str, ...], log: Path) -> str | None:
    done = await run(argv)
    if done.status == 0:
        return None
    with contextlib.suppress(FileNotFoundError):
        explanation = first_explaining_line(log.read_text(errors="replace"))
        return describe_failure(done.command, done.status, explanation)
    return describe_failure(done.command, done.status, done.stderr)


async def _connect(port_file: Path) -> socket.socket:
    # Another process writes it, so there is nothing to await; bounded by the whole test's timeout.
    while not (port_file.exists() and port_file.read_text()):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    connection = socket.socket()
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", int(port_file.read_text())))
    return connection


async def _answer(connection: socket.socket, question: bytes, expected: bytes) -> str | None:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, question)
    answer = await loop.sock_recv(connection, 100)
    return None if answer == expected else f"the connection answered {answer!r} where {expected!r} was due"


@contextlib.contextmanager
def _killed(pid: int) -> Iterator[None]:
    """Kill the process at the end, if it is still the one that it is now."""
    started = start_time(pid)
    try:
        yield
    finally:
        if started is not None and start_time(pid) == started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
