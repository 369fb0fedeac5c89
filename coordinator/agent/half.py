"""What the two halves of a transaction share: phases with their times, deeds, and endings that nothing interrupts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from coordinator.agent.channel import Channel
from coordinator.agent.criu import Checkpointer, Dump, Restore
from coordinator.agent.deeds import Deeds, Undoer
from coordinator.agent.files.base import FilesSource, FilesTarget
from coordinator.agent.images import ImageSpace
from coordinator.agent.memory.copying import MemorySource
from coordinator.agent.memory.filling import FillingMemory
from coordinator.agent.network import ServiceNetwork
from coordinator.agent.priority import Pace
from coordinator.agent.runtimes.base import Runtime
from coordinator.errors import AgentFailed, ChannelFailed, DeadlineExceeded, Interrupted, LivemoveError
from coordinator.events import Event, EventSink
from coordinator.journal import Journal, Phase
from coordinator.protocol import HalfResult, MemoryPolicy, MigrationPlan, Outcome, PhaseTime

R = TypeVar("R")

PROGRESS_INTERVAL_MS = 100.0

#: Phases of the freeze, and the moment in which clients get their first answers. To tell of one takes processors that
#: these have better use for (a millisecond here, more where the coordinator is): it is done later, or when the freeze
#: has become so long that somebody wants to know.
IN_FREEZE = frozenset({Phase.FROZEN, Phase.DUMPED, Phase.STAGED, Phase.COMMITTED, Phase.RESUMED})
LONG_FREEZE_S = 0.5

#: Seconds on a clock that only goes forward; ``time.monotonic`` but in tests.
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Adapters:
    """The doors of one half to its host, handed in: real ones from ``server.py``, fakes in unit tests."""

    runtime: Runtime
    criu: Checkpointer
    images: ImageSpace
    network: ServiceNetwork
    memory_source: Callable[[MemoryPolicy], MemorySource]
    memory_destination: Callable[[], FillingMemory]
    pace: Callable[[Pace], None]
    wait_gone: Callable[[int, int], Coroutine[Any, Any, bool]]
    start_time: Callable[[int], int | None]
    mend: Callable[[int], Coroutine[Any, Any, None]]
    files_source: Callable[[], FilesSource]
    files_target: Callable[[], FilesTarget]


class Half:
    """Base of the source half and the destination half. ``channel``: to the other one, handed in by ``attach``; a
    recovery has none. ``lingering``: what goes on after it ended in doubt, and what its agent stays alive for."""

    channel: Channel | None = None
    lingering: asyncio.Future[None] | None = None

    def __init__(
        self, host: str, plan: MigrationPlan, journal: Journal, adapters: Adapters, *, sink: EventSink, clock: Clock
    ) -> None:
        self.plan = plan
        self.journal = journal
        self.host = host
        self.runtime = adapters.runtime
        self.criu = adapters.criu
        self.images = adapters.images
        self.network = adapters.network
        self.adapters = adapters
        self.deeds = Deeds(journal, self.undoers())
        self.warnings: list[str] = []
        self._sink = sink
        self.clock = clock
        self._began = clock()
        self._progress_at = 0.0
        self._entered: list[tuple[Phase, float]] = []
        self._untold: list[Event] = []
        self._telling: asyncio.TimerHandle | None = None
        self._parts: list[tuple[str, float]] = []

    def undoers(self) -> dict[str, Undoer]:
        """How each deed of this half is undone."""
        raise NotImplementedError

    def attach(self, channel: Channel) -> None:
        """Use this channel to the other half."""
        self.channel = channel

    def enter(self, phase: Phase, *, durable: bool = False, reason: str = "") -> None:
        """Record a phase in the journal, then tell of it; of those in the freeze a little later."""
        self.journal.enter(phase, durable=durable, reason=reason)
        self._entered.append((phase, self.elapsed_ms()))
        self._untold.append(
            Event(kind="phase", name=phase.value, host=self.host, at_ms=self.elapsed_ms(), detail=reason)
        )
        if phase not in IN_FREEZE:
            self._tell()
        elif self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(LONG_FREEZE_S, self._tell)

    def _tell(self) -> None:
        """Tell of the phases that nobody was told of yet."""
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        untold, self._untold = self._untold, []
        for event in untold:
            self._sink(event)

    def abort(self, error: LivemoveError) -> None:
        """Enter ABORTED. With a disk that takes no record the roll-back goes on all the same: without COMMITTED a
        source's hook thaws the tasks, and a destination's goes on holding them (I1, I3)."""
        try:
            self.enter(Phase.ABORTED, durable=True, reason=f"{error.code}: {error.message}")
        except OSError as failure:
            self.journal.state.phase = Phase.ABORTED
            self.warn(f"the journal on {self.host} cannot be written: {failure}")

    def let_go(self) -> None:
        """This half is over: CRIU, if it is still held, goes on by what the journal says."""
        raise NotImplementedError

    def progress(self, name: str, done: int, total: int) -> None:
        """Tell how many bytes of how many (0: not known) are done, at most every 100 ms, and not in a short freeze."""
        if self._telling is not None:
            return
        at_ms = self.elapsed_ms()
        if at_ms - self._progress_at < PROGRESS_INTERVAL_MS and done != total:
            return
        self._progress_at = at_ms
        event = Event(
            kind="progress",
            name=name,
            host=self.host,
            at_ms=at_ms,
            done=done,
            total=total,
            unit="bytes",
            state="started",
        )
        self._sink(event)

    def part(self, name: str) -> None:
        """The part of the freeze of that name ends now, and the next begins; the first name is of what was before."""
        self._parts.append((name, self.clock()))

    def record_parts(self) -> None:
        """Write to the journal where the freeze has gone. After it: a record takes time, too."""
        times = zip(self._parts, self._parts[1:], strict=False)
        parts = [(name, (end - begin) * 1000) for (_, begin), (name, end) in times]
        if not parts:
            return  # a recovery has seen no freeze
        try:
            self.journal.freeze_parts(parts)
        except OSError as failure:
            self.warn(f"the journal on {self.host} cannot be written: {failure}")

    def warn(self, *warnings: str) -> None:
        """Tell of something that went wrong without changing the outcome."""
        if warnings:
            self._tell()
        self.warnings.extend(warnings)
        for warning in warnings:
            self._sink(Event(kind="notice", name="WARNING", host=self.host, at_ms=self.elapsed_ms(), detail=warning))

    async def seen(self, look: Awaitable[R], nothing: R) -> R:
        """What a look finds that nothing hangs on: where it fails that is a warning, and the answer is ``nothing``."""
        try:
            return await look
        except Exception as error:
            self.warn(f"looking at what there is on {self.host}: {as_livemove_error(error, 'looking')}")
            return nothing

    def elapsed_ms(self) -> float:
        """Milliseconds since this half began."""
        return (self.clock() - self._began) * 1000

    def record_criu(self, name: str) -> Callable[[int], None]:
        """A callback that records the pid of a CRIU command, so that a recovery can wait for its end.

        Not durable, because it may lie in the freeze; with the host, CRIU would be gone too."""

        def started(pid: int) -> None:
            try:
                self.deeds.record(name, durable=False, pid=pid, started=self.adapters.start_time(pid) or 0)
            except OSError as failure:  # it runs, and we hold it: only a recovery would miss this
                self.warn(f"the journal on {self.host} cannot be written: {failure}")

        return started

    async def end_criu(self, name: str, held: Dump | Restore | None, deadline_s: float) -> None:
        """Let the CRIU of the deed of that name go on, as the journal says, and wait for its end; where none is held,
        which is in a recovery, for that of another agent's CRIU."""
        if held is not None:
            async with asyncio.timeout(deadline_s):
                await held.end()
            return
        for deed, params in self.journal.state.deeds.values():
            if deed == name:
                await self._wait_criu(params)

    async def _wait_criu(self, params: dict[str, Any]) -> None:
        """Wait until the CRIU command of a deed has ended; its hook has been told by the journal what to do."""
        if params.get("pid") and not await self.adapters.wait_gone(params["pid"], params["started"]):
            raise AgentFailed(f"CRIU (pid {params['pid']}) is still running", "Look at that process.")

    def _link(self) -> Channel:
        if self.channel is None:
            raise ChannelFailed("there is no channel to the other host's agent")
        return self.channel

    def finished(self, phase: Phase) -> None:
        """Enter the last phase, unless something could not be undone: then a recovery finds it unfinished."""
        if self.journal.state.deeds:
            self.warn(f"{self.host} is not clean: finish with `livemove recover {self.plan.id}`")
            return
        try:
            self.enter(phase, durable=True)
        except OSError as failure:
            self.warn(f"the journal on {self.host} cannot be written: {failure}")

    def result(self, outcome: Outcome, error: LivemoveError | None = None, **values: Any) -> HalfResult:
        """The half's result with its phases and warnings."""
        self._tell()
        ends = [*(at for _, at in self._entered), self.elapsed_ms()][1:]
        phases = tuple(
            PhaseTime(name=phase.value, start_ms=round(start, 3), ms=round(end - start, 3))
            for (phase, start), end in zip(self._entered, ends, strict=True)
        )
        return HalfResult(
            outcome=outcome,
            phase=self.journal.phase,
            phases=phases,
            warnings=tuple(self.warnings),
            error=None if error is None else error.to_wire(),
            **values,
        )


#: All reasons for which a half gives up. Also a defect of ours leaves the service running where it was.
ANY_REASON = (Exception, asyncio.CancelledError)


def as_livemove_error(error: BaseException, doing: str) -> LivemoveError:
    """Any reason for which a half stops, as an error with a code."""
    if isinstance(error, LivemoveError):
        return error
    if isinstance(error, asyncio.CancelledError):
        return Interrupted(f"interrupted {doing}")
    if isinstance(error, TimeoutError):
        return DeadlineExceeded(f"deadline passed {doing}")
    return AgentFailed(f"{type(error).__name__} {doing}: {error}")


async def ended(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait for its end, whatever that is."""
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()  # seen


async def uninterrupted(work: Coroutine[Any, Any, R]) -> R:
    """Run ``work`` to its end although this task is cancelled meanwhile: roll-back and what follows the commit point
    are not given up halfway. The work itself is bounded by its deadlines."""
    task = asyncio.ensure_future(work)
    while True:
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise
