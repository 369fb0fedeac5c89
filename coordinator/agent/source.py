"""The source half: drives the transaction from the first byte to the commit point, and cleans up behind it.

The order is the design's. Peers are diverted *before* the service is frozen, so that no packet meets a closed door; the
commit point is one fsynced record in this half's journal; from then on this half never lets the tasks run again.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import cached_property
from typing import Any

from coordinator.agent.channel import expect
from coordinator.agent.criu import Dump
from coordinator.agent.deeds import Undoer
from coordinator.agent.dumping import DumpingHalf
from coordinator.agent.files.base import FilesSource
from coordinator.agent.half import ANY_REASON, as_livemove_error, uninterrupted
from coordinator.agent.handing_back import HandBack
from coordinator.agent.memory.convergence import Kind
from coordinator.agent.messages import (
    Divert,
    Diverted,
    FilledIn,
    FrozenNow,
    GaveUp,
    GiveUp,
    Go,
    ImagesComplete,
    LoadRestore,
    RestoreLoaded,
    Resumed,
    Staged,
)
from coordinator.agent.settling import Settling
from coordinator.agent.tracking import TrackedSource
from coordinator.errors import (
    ChannelFailed,
    FrozenTooLong,
    InDoubt,
    LivemoveError,
    PeerAborted,
    ProtocolError,
)
from coordinator.facts import SocketFacts
from coordinator.journal import Phase
from coordinator.protocol import HalfResult, Outcome
from netfix.gate import FREEZING, OPEN, SILENT


class SourceHalf(DumpingHalf):
    """See the module."""

    _frozen_at: float = 0.0
    _freeze_ms: float = 0.0
    _sockets: tuple[SocketFacts, ...] = ()
    _peer_is_silent: bool = False

    @cached_property
    def files(self) -> FilesSource:
        """How files get to the destination."""
        return self.adapters.files_source()

    @cached_property
    def tracked(self) -> TrackedSource:
        """How firewalls on the destination learn of the connections."""
        return TrackedSource(self.network, wanted=self.plan.track_connections)

    @cached_property
    def settling(self) -> Settling:
        """What is waited for before the freeze."""
        hand_back = HandBack(self.network)
        return Settling(
            lambda: self.network.pending(self._root_pid),
            lambda unfinished: hand_back.take(self._link(), unfinished),
            self.plan.deadlines,
            self.clock,
        )

    def undoers(self) -> dict[str, Undoer]:
        """See ``Half``."""
        return {
            "image_space": lambda _: self.images.remove(),
            "gate": lambda _: self.network.remove_gate(),
            "addresses": self._take_addresses_back,
            "dump": self._thaw,
        }

    async def prepare(self) -> None:
        """Make the image space and an open gate, so that nothing but its state has to change later."""
        self.files.claim()
        self.deeds.record("image_space")
        await self.images.create(self.plan.image_space_bytes)
        self.deeds.record("gate")
        await self.network.set_gate(OPEN)
        self.enter(Phase.PREPARED, durable=True)

    def let_go(self) -> None:
        """See ``Half``."""
        self.files.close()
        if self._dump is not None:
            self._dump.let_go()

    async def run(self) -> HalfResult:
        """The whole migration as the source sees it."""
        try:
            await self._until_staged()
        except ANY_REASON as error:
            return await uninterrupted(self.give_up(as_livemove_error(error, f"in phase {self.journal.phase}")))
        # The commit point. I3: before this record is on disk the tasks can always be thawed with their connections;
        # after it they never run here again. No await lies between STAGED and it, so nothing can come between.
        try:
            self.enter(Phase.COMMITTED, durable=True)
            self.part("the commit recorded")
        except OSError as error:  # the record does not exist: it is written wholly or not at all
            return await uninterrupted(self.give_up(as_livemove_error(error, "recording the commit point")))
        return await uninterrupted(self._commit())

    async def _until_staged(self) -> None:
        await self._copy()
        dump = await self._load_criu()
        await self._load_restore()
        await self._settle()
        await self._divert()
        await self._freeze(dump)
        async with _freeze_deadline(self.plan.deadlines.freeze_s):
            await self.tracked.send_rest(self._link())
            await self._dumped(dump)
            self.enter(Phase.DUMPED)
            self.part("CRIU dumps")
            await self.memory.last(self._root_pid, self._link())  # it has begun, and a pass of files is undivided
            self.part("last pages sent")
            await self.files.last(self._root_pid, self._link())
            if self.files.wanted:
                self.part("files")
            await self._send_images()
            sizes = dict(self._sent.sizes)
            await self._link().send(ImagesComplete(sizes=sizes, pages_later=self.memory.fetched_later))
            self.part("images sent")
            await self.memory.serve_until(self._link(), Staged)
            self.part("the destination restores")
            self.files.check_untouched()
        self.enter(Phase.STAGED)

    async def _copy(self) -> None:
        """Send memory in rounds while the service runs, until a freeze would be short enough."""
        self.enter(Phase.COPYING)
        self.adapters.pace("background")
        self._root_pid = (await self._running()).root_pid
        await self.settling.notice()
        async with asyncio.timeout(self.plan.deadlines.copy_s):
            await self.files.copy(self._link(), self.progress)
            await self.memory.copy(self._root_pid, self._link(), self.progress)
            await self.files.catch_up(self._root_pid, self._link())
        if (decision := self.memory.report.decision) is not None and decision.kind is Kind.GIVE_UP:
            self.warn(f"pre-copy gave up, and the policy says {self.plan.memory.give_up}: {decision.reason}")

    async def _load_restore(self) -> None:
        """Have the destination do the same."""
        async with asyncio.timeout(self.plan.deadlines.prepare_s):
            await self._link().send(LoadRestore())
            await expect(self._link(), RestoreLoaded)

    async def _settle(self) -> None:
        """Wait for what needs its peer's packets here. That may take seconds, in which the service writes memory: so a
        round follows. What was begun meanwhile is waited for once more, and is young and little."""
        await self.settling.before_divert()
        await self.tracked.send_all(self._link())
        async with asyncio.timeout(self.plan.deadlines.copy_s):
            await self.memory.catch_up(self._link())
        await self.settling.before_divert()

    async def _divert(self) -> None:
        """Hand the segment's packets over to the destination, then work off what was received here.

        I2: we are silent before the destination answers, so at no instant do two hosts answer for an address."""
        self.adapters.pace("urgent")
        self.deeds.record("addresses")
        self.enter(Phase.DIVERTED)
        await self.network.set_gate(SILENT)
        async with asyncio.timeout(self.plan.deadlines.connect_s + self.plan.mover_s):  # nobody answers meanwhile
            await self._link().send(Divert())
            await expect(self._link(), Diverted)
        await self.network.divert()  # the destination's part is done: it holds what comes
        await self.settling.after_divert()

    async def _freeze(self, dump: Dump) -> None:
        """Close the gate, and let CRIU freeze the tasks behind it.

        The gate goes first because CRIU has no hook between its freeze and its dump (docs/decisions/0002): what the
        service writes in the milliseconds between stays in its send queues and is dumped with them (I4); its datagrams
        leave."""
        await self.network.set_gate(FREEZING)
        self._frozen_at = self.clock()
        self.part("gate closed")
        self.enter(Phase.FROZEN)
        dump.freeze()
        await self._link().send(FrozenNow())
        self.part("CRIU told to freeze")

    async def _commit(self) -> HalfResult:
        """Say GO, wait for the destination's word, and clean up."""
        try:
            await self._link().send(Go())
            async with asyncio.timeout(self.plan.deadlines.resume_s):
                await self.memory.serve_until(self._link(), Resumed)
                self.part("the destination resumes")
        except Exception as error:
            await self._tell_losses()
            known = as_livemove_error(error, "waiting for the destination to resume")
            return await self._leave("committed, and then the destination was not heard of", known)
        self._freeze_ms = (self.clock() - self._frozen_at) * 1000
        self._step_back()
        self.enter(Phase.RESUMED, durable=True)
        self.record_parts()
        await self._tell_losses()
        self.warn(*(f"{self.host}: {remark}" for remark in self.memory.remarks))
        try:
            if self.memory.fetched_later:  # post-copy: the destination needs the frozen tasks until it has all pages
                async with asyncio.timeout(self.plan.deadlines.fill_s):
                    await self.memory.serve_until(self._link(), FilledIn)
        except Exception as error:
            known = as_livemove_error(error, "serving pages")
            return await self._leave("the destination runs and its memory could not all be sent", known)
        await self._note_sockets()
        return await self.release()

    async def _leave(self, how_far: str, error: LivemoveError) -> HalfResult:
        """In doubt after the commit: whether GO arrived, say, only the destination can tell. Our copy is of no use any
        more (I3), but the gate stays closed until a recovery knows."""
        await self._note_sockets()
        self.let_go()
        await self._close_memory()
        return self._result("in_doubt", InDoubt(f"{how_far}: {error}", error.hint))

    async def _tell_losses(self) -> None:
        """What does not move is seen when nobody waits for it any more: the sockets are as they were frozen."""
        for loss in await self.seen(self.settling.losses(), []):
            self.warn(f"{self.host}: {loss}")

    async def _note_sockets(self) -> None:
        """What has moved is seen later still, when the destination needs no pages of ours."""
        self._sockets = await self.seen(self.network.sockets(self._root_pid), ())

    async def release(self) -> HalfResult:
        """After the destination resumed: let CRIU kill the frozen copy, and leave nothing but the journal (I5).

        The gate stays closed until the tasks are dead and the address is gone: their sockets' last words would be
        FIN and RST into live connections (I2)."""
        await self._close_memory()
        self.warn(*self.files.close())
        try:
            network = self.network
            steps = [self._end_dump, self.runtime.forget, network.remove_addresses, network.forget_connections]
            steps += [network.remove_namespace] if self.plan.namespace else []
            for step in steps:
                await step()
            self.files.leave()
        except (LivemoveError, OSError, TimeoutError) as error:
            # The gate stays closed: behind it nothing that is left can harm a connection.
            self.warn(f"cleaning up on {self.host}: {error}")
        else:
            self.warn(*await self.deeds.undo(keep=("addresses", "dump")))
        try:
            self.warn(*await self.network.released(()))
        except LivemoveError as error:
            self.warn(f"after the move, on {self.host}: {error}")
        self.finished(Phase.RELEASED)
        return self._result("moved")

    async def give_up(self, error: LivemoveError) -> HalfResult:
        """Before the commit point: the tasks run on here, with every connection (I3)."""
        self._peer_is_silent = isinstance(error, PeerAborted)
        self.adapters.pace("usual")
        self.abort(error)
        if self.channel is not None and not self._peer_is_silent:
            with contextlib.suppress(ChannelFailed):
                await self.channel.send(GiveUp(error=error.to_wire()))
        return await self.undo_rest(error)

    async def undo_rest(self, error: LivemoveError) -> HalfResult:
        """After ABORTED: undo what is not undone yet. Also the way on for a recovery of a roll-back cut short."""
        self.warn(*await self.deeds.undo(only=("dump",)))  # first of all: the tasks run again, behind the gate
        await self._close_memory()
        self.warn(*self.files.close())
        self.warn(*await self.deeds.undo())
        await self.network.finished()
        self.finished(Phase.ROLLED_BACK)
        return self._result("rolled_back", error)

    async def _take_addresses_back(self, _: dict[str, Any]) -> None:
        """The way back of ``_divert``, in the opposite order: first the destination falls silent, then we answer."""
        await self._wait_for_silence()
        if self.deeds.recorded("gate"):  # without one the host answers already
            await self.network.set_gate(OPEN)
        await self.network.back()

    async def _wait_for_silence(self) -> None:
        """Wait, bounded, for the destination's word that it answers no more. Without it we answer all the same: a host
        that holds packets for a service that runs here helps nobody."""
        if self.channel is None or self._peer_is_silent:
            return
        with contextlib.suppress(ChannelFailed, ProtocolError, TimeoutError):
            # It may be in the middle of its part of the mover, and then has to undo that.
            async with asyncio.timeout(self.plan.deadlines.abort_s + 2 * self.plan.mover_s):
                while not isinstance((await self.channel.receive())[0], GaveUp | GiveUp):
                    pass

    def _result(self, outcome: Outcome, error: LivemoveError | None = None) -> HalfResult:
        copied = self.memory.report
        return self.result(
            outcome,
            error,
            freeze_ms=round(self._freeze_ms, 3),
            frozen_bytes=self._sent.bytes + copied.last_bytes,
            mode=self.memory.mode,
            rounds=tuple(copied.rounds),
            pre_copy_bytes=copied.pre_copy_bytes,
            sockets=self._sockets,
        )


@contextlib.asynccontextmanager
async def _freeze_deadline(seconds: float) -> Any:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise FrozenTooLong(f"the service was frozen for more than {seconds:g} s") from error
