"""Sessions with hosts over asyncssh: verified host keys, the agent pushed by its hash, typed calls with deadlines.

The only file that imports asyncssh; its errors become ours here.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shlex
from collections.abc import AsyncIterator
from typing import TypeVar

import asyncssh

from coordinator.bundle import BOOTSTRAP, CACHE_DIR, agent_bundle
from coordinator.config import Host
from coordinator.errors import (
    DeadlineExceeded,
    HostKeyMismatch,
    HostUnfit,
    HostUnreachable,
    LivemoveError,
    LoginRefused,
    ProtocolError,
    SessionLost,
)
from coordinator.events import Event, EventSink
from coordinator.protocol import VERSION, Request
from coordinator.wire import decode, encode

R = TypeVar("R")

CONNECT_TIMEOUT_S = 10.0
START_TIMEOUT_S = 30.0
#: A session that says nothing for interval * count seconds is lost.
KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 5, 3
#: An agent keeps to a deadline by itself; this is for its answer to arrive.
_GRACE_S = 5.0


class HostSession:
    """A running agent on a host. Calls may overlap; events go to the sink as they come."""

    def __init__(self, host: Host, process: asyncssh.SSHClientProcess[bytes], sink: EventSink) -> None:
        self.host = host
        self._process = process
        self._sink = sink
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[object]] = {}
        self._lost: SessionLost | None = None
        self._reading = asyncio.ensure_future(self._read())

    async def call(self, request: Request[R], deadline_s: float) -> R:
        """Ask the agent and return its typed answer.

        Raises the agent's own error, ``DeadlineExceeded`` after ``deadline_s``, or ``SessionLost``."""
        if self._lost is not None:
            raise self._lost
        number = next(self._numbers)
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        name = type(request).__name__
        message = {"id": number, "call": name, "params": encode(request), "deadline_s": deadline_s}
        try:
            self._process.stdin.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
            async with asyncio.timeout(deadline_s + _GRACE_S):
                answer = await future
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self.host.name}: no answer to {name} within {deadline_s:g} s") from error
        except (OSError, asyncssh.Error) as error:
            raise self._session_lost(str(error)) from error
        finally:
            self._waiting.pop(number, None)
        return decode(request.reply, answer)

    async def close(self) -> None:
        """End the session; the agent ends by itself when its half has."""
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading
        with contextlib.suppress(OSError, asyncssh.Error):
            self._process.stdin.write_eof()

    async def _read(self) -> None:
        reason = "the agent ended"
        try:
            while line := await self._process.stdout.readline():
                self._take(line)
        except (OSError, asyncssh.Error, LivemoveError) as error:
            reason = str(error)
        self._lost = self._session_lost(reason)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(self._lost)

    def _take(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except ValueError as error:
            raise ProtocolError(f"{self.host.name}: the agent sent {line[:80]!r}") from error
        if "event" in message:
            self._sink(decode(Event, message["event"]))
            return
        future = self._waiting.get(message.get("id"))
        if future is None or future.done():
            return  # the answer to a call whose deadline has passed
        if "error" in message:
            future.set_exception(LivemoveError.from_wire(message["error"]))
        else:
            future.set_result(message["reply"])

    def _session_lost(self, reason: str) -> SessionLost:
        return SessionLost(f"the session to {self.host.name} was lost: {reason}")


@contextlib.asynccontextmanager
async def connect(host: Host, sink: EventSink) -> AsyncIterator[HostSession]:
    """A session with the host's agent: connect, push the agent if the host lacks it, start it.

    Raises ``HostUnreachable``, ``HostKeyMismatch``, ``LoginRefused``, ``HostUnfit``, ``ProtocolError``."""
    connection = await _connection(host)
    try:
        session = await _start_agent(host, connection, sink)
        try:
            yield session
        finally:
            await session.close()
    finally:
        connection.close()
        with contextlib.suppress(OSError, asyncssh.Error, TimeoutError):
            async with asyncio.timeout(2.0):
                await connection.wait_closed()


async def _connection(host: Host) -> asyncssh.SSHClientConnection:
    where = f"{host.name} ({host.address} port {host.port})"
    try:
        return await asyncssh.connect(
            host.address,
            host.port,
            username=host.user,
            client_keys=[str(host.key)],
            known_hosts=str(host.known_hosts),
            agent_path=None,
            config=None,
            connect_timeout=CONNECT_TIMEOUT_S,
            keepalive_interval=KEEPALIVE_INTERVAL_S,
            keepalive_count_max=KEEPALIVE_COUNT,
        )
    except asyncssh.HostKeyNotVerifiable as error:
        raise HostKeyMismatch(f"{where}: its host key is not the one in {host.known_hosts}: {error.reason}") from error
    except asyncssh.PermissionDenied as error:
        raise LoginRefused(f"{where}: login as {host.user} with {host.key} was refused") from error
    except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as error:
        raise LoginRefused(f"{where}: the key {host.key} cannot be used: {error}") from error
    except (OSError, asyncssh.Error) as error:
        raise HostUnreachable(f"{where}: {error or type(error).__name__}") from error


async def _start_agent(host: Host, connection: asyncssh.SSHClientConnection, sink: EventSink) -> HostSession:
    bundle = agent_bundle()
    command = shlex.join(["python3", "-I", "-c", BOOTSTRAP, bundle.digest, CACHE_DIR])
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            process = await connection.create_process(command, encoding=None)
            line = (await process.stdout.readline()).strip()
            if line == b"need":
                archive = bundle.compressed()
                process.stdin.write(b"%d\n" % len(archive) + archive)
                line = b"have"
            if line != b"have":
                raise await _unfit(host, process, line)
            hello = await process.stdout.readline()
            if not hello:
                raise await _unfit(host, process, b"")
    except TimeoutError as error:
        raise HostUnfit(f"{host.name}: the agent did not start within {START_TIMEOUT_S:g} s") from error
    except (OSError, asyncssh.Error) as error:
        raise HostUnreachable(f"{host.name}: {error}") from error
    if (version := json.loads(hello).get("hello")) != VERSION:
        raise ProtocolError(f"{host.name}: the agent speaks version {version}, this coordinator {VERSION}")
    return HostSession(host, process, sink)


async def _unfit(host: Host, process: asyncssh.SSHClientProcess[bytes], line: bytes) -> HostUnfit:
    """Why no agent came up: its own word, or what the shell said."""
    if line.startswith(b"unfit "):
        return HostUnfit(f"{host.name}: {line[6:].decode(errors='replace')}")
    said = (await process.stderr.read()).decode(errors="replace").strip()
    return HostUnfit(f"{host.name}: the agent did not start: {said.splitlines()[-1] if said else 'no output'}")
