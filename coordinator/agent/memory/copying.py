"""The source's side of memory: pre-copy rounds while the service runs, the last pages while it is frozen, and, in
post-copy, pages on demand from the frozen tasks until the destination has them all.

Sent are the pages that CRIU leaves to a filler, private anonymous memory, and shared memory (see
``shared.py``). CRIU's images have the rest.
"""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from coordinator.agent.channel import CHUNK_BYTES, Channel, expect, peer_aborted
from coordinator.agent.images import ImageSpace
from coordinator.agent.memory.base import NO_FILES, PAGE_BYTES, Changes, HeldFiles, PageRun, ProcessChanges
from coordinator.agent.memory.comparing import forget_differing, send_differing
from coordinator.agent.memory.convergence import ConvergencePolicy, Decision, Kind, RoundStats, decide
from coordinator.agent.memory.copy_report import CopyReport
from coordinator.agent.memory.handing_over import described, hand_over
from coordinator.agent.memory.hidden_pages import HiddenPages, hide
from coordinator.agent.memory.page_messages import dropped
from coordinator.agent.memory.pages import PageData, read_pages
from coordinator.agent.memory.ptrace import TargetGone
from coordinator.agent.memory.shared import SharedMemory, Span
from coordinator.agent.memory.tmpfs_source import NoTmpfs, TmpfsSource
from coordinator.agent.memory.tree import inner_pid
from coordinator.agent.messages import (
    ChannelMessage,
    FetchedPages,
    FetchPages,
    GiveUp,
    PageBatch,
    ProcessGone,
    RoundEnd,
    RoundStored,
)
from coordinator.agent.process import start_time
from coordinator.agent.tasks import process_tree
from coordinator.errors import MemoryLost, NotConverging, ProtocolError, WorkloadNotRunning
from coordinator.events import Progress
from coordinator.protocol import MemoryPolicy, Mode

T = TypeVar("T")


def processes_of(root_pid: int) -> dict[int, int]:
    """The processes of a tree: pid in CRIU's images → pid here."""
    return {inner_pid(pid): pid for pid in process_tree(root_pid)}


class Trackers(Protocol):
    """All processes of the workload (``tree.TreeTracker``)."""

    def collect(self, *, last: bool = False, files: HeldFiles = NO_FILES) -> dict[int, ProcessChanges]:
        """What changed in each process since the last call (see ``TreeTracker``)."""

    def take_gone(self) -> tuple[int, ...]:
        """Inner pids of processes that have gone since the last call."""

    @property
    def at_freeze(self) -> Callable[[], None] | None:
        """To be called when all tasks are frozen and CRIU has not attached any segment; ``None``: need not be."""

    def close(self) -> None:
        """Remove every trace from the processes."""


#: Reads runs of pages out of a process.
ReadPages = Callable[[int, Iterable[PageRun]], Iterator[PageData]]


class MemorySource:
    """The memory of one migration on the source. ``track`` begins to track a tree; it and ``close`` may block."""

    def __init__(
        self,
        policy: MemoryPolicy,
        track: Callable[[int], Trackers],
        *,
        clock: Callable[[], float],
        read: ReadPages = read_pages,
        processes: Callable[[int], dict[int, int]] = processes_of,
        started: Callable[[int], int | None] = start_time,
        hide: Callable[[int, Iterable[ProcessChanges]], HiddenPages | None] = hide,
        tmpfs: Callable[[int], TmpfsSource] = lambda _: NoTmpfs(),
    ) -> None:
        self.mode: Mode = policy.mode
        self.report = CopyReport()
        self._shared = SharedMemory()
        self._described: set[int] = set()
        self._policy = policy
        self._track = track
        self._read = read
        self._processes = processes
        self._started = started
        self._hide = hide
        self._find_tmpfs = tmpfs
        self._tmpfs: TmpfsSource = NoTmpfs()
        self._clock = clock
        #: The pages that CRIU was not to see, which must be sent here.
        self.hidden: HiddenPages | None = None
        self._trackers: Trackers | None = None
        self._busy: asyncio.Future[Any] | None = None
        self._last: asyncio.Future[dict[int, ProcessChanges]] | None = None
        #: The frozen tasks: pid in CRIU's images → pid here, and when it started.
        self._frozen: dict[int, tuple[int, int | None]] = {}
        self._progress: Progress = lambda *_: None

    @property
    def lazy(self) -> bool:
        """Whether CRIU dumps without the pages that are sent here."""
        return self.mode != "stop-copy"

    @property
    def fetched_later(self) -> bool:
        """Whether the destination still needs the frozen tasks after it has resumed."""
        return self.mode in ("post-copy", "hybrid")

    @property
    def at_freeze(self) -> Callable[[], None] | None:
        """To be called, in any thread, when all tasks are frozen and CRIU has looked at nothing of theirs; ``None``:
        need not be. Else the last look finds more to be changed than is."""
        return self._trackers.at_freeze if self._trackers is not None else None

    @property
    def external(self) -> tuple[str, ...]:
        """What CRIU is to leave to us (criu(8), --external), once it is copied."""
        return self._tmpfs.external

    @property
    def remarks(self) -> tuple[str, ...]:
        """Why the freeze was longer than it had to be, a sentence for each reason."""
        return self.report.remarks(self.hidden.refusal if self.hidden is not None else "")

    async def copy(self, root_pid: int, link: Channel, progress: Progress) -> None:
        """Send rounds until a freeze now would be short, or until that gets no nearer.

        Raises ``NotConverging`` if the policy says so, ``TrackingFailed`` if a process cannot be tracked."""
        if self.mode not in ("pre-copy", "hybrid"):
            return
        self._progress = progress
        await self._begin(root_pid)
        stats = list[RoundStats]()
        pending = await self._collect()
        left = self._dirty_bytes(pending)
        memory_bytes = max(left, PAGE_BYTES)
        while True:
            began = self._clock()
            sent = await self._send_round(pending, left, link)
            pending = await self._collect()
            duration_ms = (self._clock() - began) * 1000
            self.report.add_round(sent, duration_ms)
            left = self._dirty_bytes(pending)
            stats.append(RoundStats(len(stats) + 1, sent // PAGE_BYTES, sent, duration_ms, left))
            decision = decide(tuple(stats), memory_bytes, self._convergence())
            if decision.kind is not Kind.ANOTHER_ROUND:
                break
        self.report.decision = decision
        if decision.kind is Kind.GIVE_UP:
            self._give_up(decision)
        # What the last look found is re-armed and so must be sent; the freeze is left with what is written after it.
        began = self._clock()
        self.report.add_round(await self._send_round(pending, left, link), (self._clock() - began) * 1000)
        if self.mode == "pre-copy":
            self.hidden = self._hide(root_pid, pending.values())

    async def catch_up(self, link: Channel) -> None:
        """One more round, when all is ready for the freeze: that is left with what is written after it."""
        if self._trackers is not None:
            began = self._clock()
            sent = await send_differing(link, self._shared)
            pending = await self._collect(fixed=True)
            sent += await self._send_round(pending, self._dirty_bytes(pending), link)
            self.report.add_round(sent, (self._clock() - began) * 1000)

    def _convergence(self) -> ConvergencePolicy:
        policy = self._policy
        return ConvergencePolicy(
            max_freeze_ms=policy.max_freeze_ms,
            fixed_ms=0.0,  # the bound is for what memory adds: the rest of a freeze does not depend on rounds
            max_rounds=policy.max_rounds,
            max_bytes_factor=policy.max_factor,
        )

    def _give_up(self, decision: Decision) -> None:
        if self._policy.give_up == "abort":
            raise NotConverging(f"pre-copy does not converge: {decision.reason}")
        if self._policy.give_up == "post-copy":
            self.mode = "hybrid"

    def begin_last(self, root_pid: int, link: Channel) -> None:
        """The tasks are frozen, and CRIU has finished with them: ``last`` may begin while it goes on. Once."""
        self._last = asyncio.ensure_future(self._send_last(root_pid, link))

    async def last(self, root_pid: int, link: Channel) -> None:
        """CRIU has dumped the frozen tasks: send what was written since the last round, or, where it is fetched later,
        have the destination forget it. Raises ``TrackingFailed`` if CRIU left out what nobody else has looked at."""
        changed = await (self._last or self._send_last(root_pid, link))
        if self.hidden is not None:
            self.report.last_bytes += await hand_over(link, self._shared, self.hidden.objects, changed.values())
        self.report.last_bytes += await self._tmpfs.complete(link)

    async def _send_last(self, root_pid: int, link: Channel) -> dict[int, ProcessChanges]:
        """What does not depend on what CRIU does after the tasks: it makes images of shared memory, and folders of its
        own in a tmpfs (criu/mount.c, get_clean_mnt). Returns what the last look has found."""
        if self._trackers is None:
            if self.lazy:
                self._know_frozen(self._processes(root_pid))
            return {}
        changed = await self._collect(last=True)
        self.report.unwatched_bytes = sum(each.changes.unwatched_pages for each in changed.values()) * PAGE_BYTES
        if self.hidden is not None:
            self.hidden.check(changed.values())
        self._know_frozen({each.inner_pid: each.pid for each in changed.values()})
        for pid in self._trackers.take_gone():
            await link.send(ProcessGone(pid=pid))
        # In larger pieces than in a round, as nobody else wants this processor.
        self.report.last_bytes += await self._tmpfs.send(link, at_once=CHUNK_BYTES)
        if self.fetched_later:
            self._shared.outdate(changed.values())
        else:
            self.report.last_bytes += await self._send_shared(changed, link)
        await asyncio.to_thread(forget_differing, self._shared)
        for each in changed.values():
            if self.fetched_later:
                if each.fresh:  # not all that was sent of it before need be named again
                    await link.send(ProcessGone(pid=each.inner_pid))
                await self._drop(each, link, (*each.changes.dirty, *each.changes.dropped))
            else:
                self.report.last_bytes += await self._send_process(each, link)
        return changed

    async def serve_until(self, link: Channel, kind: type[ChannelMessage]) -> None:
        """Receive until a message of that kind comes, and send meanwhile the pages that the destination asks for."""
        while True:
            message, _ = await link.receive()
            if isinstance(message, kind):
                return
            if isinstance(message, GiveUp):
                raise peer_aborted(message)
            if not isinstance(message, FetchPages) or not self.fetched_later:
                raise ProtocolError(f"the destination sent {type(message).__name__} where {kind.__name__} was due")
            await link.send(FetchedPages(number=message.number), await asyncio.to_thread(self._content, message))

    def _know_frozen(self, outer: dict[int, int]) -> None:
        self._frozen = {inner: (pid, self._started(pid)) for inner, pid in outer.items()}

    def _content(self, wanted: FetchPages) -> bytes:
        """Pages as they are; those that hold nothing are zero, as they would be for the task itself.

        Of a task that is gone nothing can be read, and that is not the same (I4): raises ``MemoryLost``."""
        pid, started = self._frozen.get(wanted.pid, (0, None))
        content = bytearray(wanted.count * PAGE_BYTES)
        for batch in self._read(pid, [PageRun(wanted.address, wanted.count)]) if started is not None else ():
            for run, data in batch:
                offset = run.start - wanted.address
                content[offset : offset + len(data)] = data
        if started is None or self._started(pid) != started:
            raise MemoryLost(f"the frozen process {wanted.pid} is gone, and its memory with it")
        return bytes(content)

    async def close(self) -> None:
        """Remove every trace from the processes. Idempotent."""
        self._shared.stop()  # the service may be running again, and nobody reaches it before this is over
        self._tmpfs.stop()
        if self._last is not None:
            self._last.cancel()
            await asyncio.gather(self._last, return_exceptions=True)
        if self._busy is not None:  # cancelled while a thread was with the trackers, which one at a time may use
            await asyncio.wait((self._busy,))
        self._tmpfs.close()
        if self._trackers is not None:
            trackers, self._trackers = self._trackers, None
            await asyncio.to_thread(trackers.close)

    async def _begin(self, root_pid: int) -> None:
        def begin() -> None:
            self._trackers = self._track(root_pid)
            self._tmpfs = self._find_tmpfs(root_pid)

        self._busy = asyncio.ensure_future(asyncio.to_thread(begin))
        try:
            await asyncio.shield(self._busy)
        except TargetGone as error:
            raise WorkloadNotRunning(f"the workload ended before its memory was copied: {error}") from error

    async def _collect(self, *, last: bool = False, fixed: bool = False) -> dict[int, ProcessChanges]:
        """Look at everything. What is watched is watched before the processes are asked, and read after it.

        ``fixed``: CRIU has been told what is ``external``."""

        def look(trackers: Trackers) -> dict[int, ProcessChanges]:
            self._tmpfs.begin(last=last, fixed=fixed)
            changed = trackers.collect(last=last, files=self._tmpfs.known)
            self._tmpfs.take(changed.values(), last=last)
            return changed

        return await self._in_thread(look)

    async def _in_thread(self, use: Callable[[Trackers], T]) -> T:
        """Use the trackers, which block, in a thread; when this is cancelled, ``close`` waits for the thread."""
        assert self._trackers is not None
        busy = self._busy = asyncio.ensure_future(asyncio.to_thread(use, self._trackers))
        try:
            return await asyncio.shield(busy)
        except TargetGone as error:
            raise WorkloadNotRunning(f"the workload ended while its memory was copied: {error}") from error

    async def _send_round(self, changed: dict[int, ProcessChanges], total: int, link: Channel) -> int:
        """Send a round of ``total`` bytes, and wait until the destination has stored it: the bandwidth that counts."""
        assert self._trackers is not None
        sent = 0
        for pid in self._trackers.take_gone():
            await link.send(ProcessGone(pid=pid))
        for each in changed.values():
            sent += await self._send_process(each, link, lambda done: self._progress("memory", done, total), sent)
        sent += await self._send_shared(changed, link)
        sent += await self._tmpfs.send(link)
        await link.send(RoundEnd(n=len(self.report.rounds) + 1))
        await expect(link, RoundStored)
        return sent

    async def _send_process(
        self, each: ProcessChanges, link: Channel, progress: Callable[[int], None] = lambda _: None, before: int = 0
    ) -> int:
        if each.fresh:
            await link.send(ProcessGone(pid=each.inner_pid))
        await self._drop(each, link, each.changes.dropped)
        sent = 0
        batches = self._read(each.pid, lazy_runs(each.changes))
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            starts = tuple(run.start for run in batch.runs)
            counts = tuple(run.pages for run in batch.runs)
            # A copy, because the reader uses its buffer again.
            await link.send(PageBatch(pid=each.inner_pid, starts=starts, counts=counts), bytes(batch.data))
            await self._drop(each, link, batch.vanished)
            sent += len(batch.data)
            progress(before + sent)
        return sent

    async def _send_shared(self, changed: dict[int, ProcessChanges], link: Channel) -> int:
        """Send what changed in shared memory; what it is in CRIU's images is known only after the dump."""
        sent = 0
        for wanted in self._shared.round(changed.values()):
            if wanted.object not in self._described:
                self._described.add(wanted.object)
                await link.send(described(wanted.object, wanted.pid, wanted.mapping))
            batches = self._read(wanted.pid, wanted.runs)
            while (batch := await asyncio.to_thread(next, batches, None)) is not None:
                if wanted.digests is not None:
                    await asyncio.to_thread(wanted.note, batch)
                starts = tuple(run.start + wanted.shift for run in batch.runs)
                counts = tuple(run.pages for run in batch.runs)
                await link.send(PageBatch(pid=wanted.object, starts=starts, counts=counts), bytes(batch.data))
                self._shared.unsent(wanted, batch.vanished)
                sent += len(batch.data)
        return sent

    def images(self, space: ImageSpace) -> dict[str, tuple[int, list[Span]]]:
        """The pages images of which the destination has a part from the rounds (see ``SharedMemory.images``)."""
        return self._shared.images(space, self.hidden.objects if self.hidden is not None else ())

    def _dirty_bytes(self, changed: dict[int, ProcessChanges]) -> int:
        private = sum(run.pages for each in changed.values() for run in lazy_runs(each.changes))
        return (private + self._shared.dirty_pages(changed.values())) * PAGE_BYTES + self._tmpfs.dirty_bytes

    @staticmethod
    async def _drop(each: ProcessChanges, link: Channel, runs: tuple[PageRun, ...]) -> None:
        for message in dropped(each.inner_pid, [(run.start, run.end) for run in runs]):
            await link.send(message)


def lazy_runs(changes: Changes) -> list[PageRun]:
    """The dirty runs in mappings that CRIU leaves to its daemon (pure). A run never crosses the end of a mapping."""
    starts = [mapping.start for mapping in changes.mappings]
    return [
        run
        for run in changes.dirty
        if (at := bisect.bisect_right(starts, run.start) - 1) >= 0 and changes.mappings[at].lazy
    ]
