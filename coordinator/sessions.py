"""What a session with a host's agent looks like, and sessions with many hosts at once.

``ssh.connect`` is the real ``SessionFactory``; ``fakes.FakeHosts`` has the one for tests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from coordinator.config import Host
from coordinator.errors import LivemoveError
from coordinator.events import Event, EventSink
from coordinator.protocol import Request

R = TypeVar("R")
StepState = Literal["started", "completed", "failed"]


class Session(Protocol):
    """A host's agent, ready to be asked."""

    @property
    def host(self) -> Host:
        """The host it is a session with."""

    async def call(self, request: Request[R], deadline_s: float) -> R:
        """Ask; raises the agent's own error, ``DeadlineExceeded`` or ``SessionLost``."""


class SessionFactory(Protocol):
    """Opens a session, and closes it at the end of the ``async with``."""

    def __call__(self, host: Host, sink: EventSink) -> AbstractAsyncContextManager[Session]:
        """Raises ``HostUnreachable``, ``HostKeyMismatch``, ``LoginRefused`` or ``HostUnfit`` on entering."""


@dataclass(frozen=True)
class Sessions:
    """Sessions by host name, and why the other hosts have none."""

    open: dict[str, Session]
    failed: dict[str, LivemoveError]


@asynccontextmanager
async def open_sessions(hosts: Iterable[Host], connect: SessionFactory, sink: EventSink) -> AsyncIterator[Sessions]:
    """Connect to all hosts at the same time; a host that cannot be reached is told in ``failed`` and stops nothing.

    Every session is opened and closed by a task of its own, so that leaving one never waits for another.
    """
    holders = [_Holder(host, connect, sink) for host in hosts]
    tasks = [asyncio.create_task(holder.run()) for holder in holders]
    try:
        results = {holder.host.name: await holder.ready for holder in holders}
        failed = {name: result for name, result in results.items() if isinstance(result, LivemoveError)}
        opened = {name: result for name, result in results.items() if not isinstance(result, LivemoveError)}
        yield Sessions(opened, failed)
    finally:
        for holder, task in zip(holders, tasks, strict=True):
            holder.leave(task)
        await asyncio.gather(*tasks, return_exceptions=True)


class _Holder:
    """Keeps one session open from ``ready`` until ``leave``."""

    def __init__(self, host: Host, connect: SessionFactory, sink: EventSink) -> None:
        self.host = host
        self.ready: asyncio.Future[Session | LivemoveError] = asyncio.get_running_loop().create_future()
        self._connect = connect
        self._sink = sink
        self._over = asyncio.Event()

    async def run(self) -> None:
        clock = asyncio.get_running_loop().time
        started = clock()

        def tell(state: StepState, detail: str = "") -> None:
            at_ms = (clock() - started) * 1000
            self._sink(Event(kind="step", name="connect", host=self.host.name, at_ms=at_ms, state=state, detail=detail))

        tell("started")
        try:
            async with self._connect(self.host, self._sink) as session:
                tell("completed")
                self.ready.set_result(session)
                await self._over.wait()
        except LivemoveError as error:
            tell("failed", error.message)
            if not self.ready.done():
                self.ready.set_result(error)
        except asyncio.CancelledError:
            self.ready.cancel()
            raise
        except Exception as error:
            if not self.ready.done():  # a defect: the one who waits for the session has to hear of it
                self.ready.set_exception(error)
            raise

    def leave(self, task: asyncio.Task[None]) -> None:
        self._over.set()
        if not self.ready.done():
            task.cancel()
