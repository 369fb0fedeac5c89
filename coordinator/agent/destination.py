"""The destination half: takes what the source sends, restores up to the last step before running, and waits for GO.

Until GO it undoes everything when anything fails. Between STAGED and GO it cannot know the outcome: it stays held, and
only the source's journal decides (I1).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from coordinator.agent.channel import peer_aborted
from coordinator.agent.criu import Restore
from coordinator.agent.deeds import Undoer
from coordinator.agent.half import ANY_REASON, as_livemove_error, ended, uninterrupted
from coordinator.agent.handing_back import answer_until_frozen
from coordinator.agent.incoming import receive_images, receive_rounds
from coordinator.agent.memory.fetching import PageFetcher
from coordinator.agent.messages import (
    ChannelMessage,
    Divert,
    Diverted,
    FetchedPages,
    GaveUp,
    GiveUp,
    Go,
    LoadRestore,
    RestoreLoaded,
    Resumed,
    Staged,
)
from coordinator.agent.restoring import RestoringHalf
from coordinator.errors import (
    ChannelFailed,
    InDoubt,
    LivemoveError,
    NetworkChangeFailed,
    PeerAborted,
    ProtocolError,
)
from coordinator.facts import SocketFacts
from coordinator.journal import Phase
from coordinator.protocol import HalfResult
from netfix.ctnetlink import from_bytes
from netfix.gate import CLOSED
from netfix.hold import HoldReport


class DestinationHalf(RestoringHalf):
    """See the module."""

    _go: asyncio.Future[Go] | None = None
    _releasing: asyncio.Future[None] | None = None
    _received_bytes: int = 0
    _sockets: tuple[SocketFacts, ...] = ()
    _root_pid: int = 0

    def undoers(self) -> dict[str, Undoer]:
        """See ``Half``."""
        return {
            "image_space": lambda _: self.images.remove(),
            "gate": self._remove_gate,
            "addresses": lambda _: self.network.remove_addresses(),
            "mover": lambda _: self.network.back(),
            "restore": self._discard,
            "memory": self._end_memory,
            "namespace": lambda _: self.network.remove_namespace(),
            "connections": lambda _: self.network.forget_connections(),
            "files": self._remove_files,
        }

    async def prepare(self) -> None:
        """Image space, then a closed gate, and only behind it the addresses: nobody learns that they are here."""
        self.deeds.record("files", before=self.files.look())
        self.files.make()
        self.deeds.record("image_space")
        await self.images.create(self.plan.image_space_bytes)
        if self.plan.namespace is not None:
            await self.network.check_namespace()
            self.deeds.record("namespace")
            await self.network.make_namespace()
        await self.runtime.prepare_restore()  # podman may have to make the container in its namespace
        self.deeds.record("gate")
        await self.network.open_hold()
        await self.network.set_gate(CLOSED)
        self.deeds.record("addresses")
        await self.network.add_addresses()
        await self._prepare_memory()
        self.enter(Phase.PREPARED, durable=True)

    def let_go(self) -> None:
        """See ``Half``."""
        if self._restore is not None:
            self._restore.let_go()

    async def run(self) -> HalfResult:
        """The whole migration as the destination sees it."""
        try:
            return await self._to_the_end()
        finally:
            for waited_for in (self._go, self._releasing):
                if waited_for is not None:
                    await ended(waited_for)

    async def _to_the_end(self) -> HalfResult:
        try:
            await self._until_staged()
        except ANY_REASON as error:
            return await uninterrupted(self.give_up(as_livemove_error(error, f"in phase {self.journal.phase}")))
        try:
            await uninterrupted(self._wait_for_go())
        except PeerAborted as error:
            return await uninterrupted(self.give_up(error))
        except Exception as error:
            known = as_livemove_error(error, "waiting for the source's decision")
            return await uninterrupted(self._stay_in_doubt(f"staged, and then the source was not heard of: {known}"))
        # I1: the source has this on its disk already, and never runs the tasks again.
        try:
            self.part("GO received")
            self.enter(Phase.COMMITTED)
        except OSError as error:  # the disk is full: a recovery commits when it is not
            return await uninterrupted(self._stay_in_doubt(f"told to run, and the journal cannot be written: {error}"))
        return await uninterrupted(self.finish())

    async def _wait_for_go(self) -> None:
        """Not to be interrupted: from STAGED on an ``Abort`` comes too late to be decided here, and to stop listening
        would cost a service whose pages are still on the source."""
        await self._link().send(Staged())
        assert self._go is not None
        async with asyncio.timeout(self.plan.deadlines.connect_s + self.plan.deadlines.freeze_s):
            await asyncio.shield(self._go)

    async def _stay_in_doubt(self, why: str) -> HalfResult:
        """GO may be lost on its way. What is restored stays held at its hook, which reads our journal; and we are
        silent, because a source that has not committed answers for the addresses again (I2)."""
        self.let_go()
        await self.fall_silent()
        self.warn(*await self.deeds.undo(only=("mover",)))
        self._linger()
        return self.result("in_doubt", InDoubt(why))

    async def _until_staged(self) -> None:
        """Before STAGED a source that is not heard of in time cannot have committed, and we give up."""
        deadlines = self.plan.deadlines
        self.enter(Phase.COPYING)
        self.adapters.pace("background")
        before_divert_s = 2 * (deadlines.accept_s + deadlines.close_s)
        async with asyncio.timeout(deadlines.copy_s + deadlines.prepare_s + before_divert_s):
            await self._receive_rounds(LoadRestore)
            restore = await self._load_restore()
            await self._link().send(RestoreLoaded())
            await self._receive_rounds(Divert)
        after_divert_s = deadlines.accept_s + 2 * self.plan.mover_s
        async with asyncio.timeout(deadlines.connect_s + after_divert_s + deadlines.freeze_s):
            await self._until_restored(restore)
        self.enter(Phase.STAGED)

    async def _receive_rounds(self, until: type[ChannelMessage]) -> None:
        await receive_rounds(self._link(), self.images, self._memory, self._track, self.files, until=until)

    async def _until_restored(self, restore: Restore) -> None:
        await self._divert()
        await answer_until_frozen(self._link(), self.network)
        self.enter(Phase.FROZEN)
        self.part("told of the freeze")
        pages_later, self._received_bytes = await receive_images(
            self._link(), self.images, self._memory, self._track, self.files
        )
        self.enter(Phase.DUMPED)
        self.part("dump, pages and images arrive")
        self._fetcher = PageFetcher(self._link()) if pages_later else None
        self._go = asyncio.ensure_future(self._receive_go())
        if self._memory is not None:
            fetch = self._fetcher.fetch if self._fetcher is not None else None
            await self._memory.serve(self.images.images, fetch)
            self.part("filler started")
        restore.begin()
        root_pid = await self._staged(restore, self._go)
        self.part("CRIU restores")
        if self._memory is not None:
            self.warn(*(f"{self.host}: {remark}" for remark in await self._memory.watch(root_pid)))
            self.part("guard watches")

    async def _track(self, entries: bytes) -> None:
        """Make the source's entries of tracked connections before a packet of theirs meets a firewall here."""
        if not self.deeds.recorded("connections"):
            self.deeds.record("connections", durable=False)  # with the host, its table is gone too
        await self.network.track_connections(from_bytes(entries))

    async def _receive_go(self) -> Go:
        while True:
            message, payload = await self._link().receive()
            if isinstance(message, Go):
                return message
            if isinstance(message, GiveUp):
                raise peer_aborted(message)
            if not isinstance(message, FetchedPages) or self._fetcher is None:
                raise ProtocolError(f"the source sent {type(message).__name__} where Go was due")
            self._fetcher.answer(message, payload)

    async def _staged(self, restore: Restore, go: asyncio.Future[Go]) -> int:
        """Wait for the restore, and listen meanwhile: a source that gives up will answer for the addresses again, and
        by then we must not (I2). One that is gone cannot have committed, because we have not said STAGED."""
        staged = asyncio.ensure_future(restore.staged())
        try:
            await asyncio.wait((staged, go), return_when=asyncio.FIRST_COMPLETED)
            if go.done():
                go.result()
                raise ProtocolError("the source said Go before it was told Staged")
            return staged.result()
        finally:
            await ended(staged)

    async def _divert(self) -> None:
        """Answer for the addresses from now on (I2: the source has fallen silent), and keep what arrives: with no
        socket here, the kernel would answer a peer's segment with a RST."""
        self.enter(Phase.DIVERTED)
        self.adapters.pace("urgent")
        await self.network.hold_arrivals()
        await self._draw_packets()
        await self._link().send(Diverted())

    async def _draw_packets(self) -> None:
        """Our part of the mover. What only sends frames has nothing to undo after a reboot."""
        self.deeds.record("mover", durable=self.plan.workload.mover.kind != "l2")
        await self.network.divert()

    async def finish(self) -> HalfResult:
        """After COMMITTED: let the tasks run, let go of what was held for them, tell the source, clean up.

        What is sent gets out first: CRIU's window probes make every peer send at once what it has. The held packets
        follow as soon as the sockets take them, in their order, while CRIU lets go of the tasks: with thousands of
        them, the tasks run first. From here on nothing stops this half: what fails leaves it in doubt, for a recovery
        to do again, and memory still comes in."""
        doubts: list[LivemoveError] = []
        await self._attempt(self._let_out, doubts)  # what they send is lost behind the gate, and they send it again
        try:
            await self._connect()
            releasing = self._releasing = asyncio.ensure_future(self._attempt(self._release_held, doubts))
            await self._resume()
        except Exception as error:
            if self._releasing is not None:
                await self._releasing
            self.let_go()  # the journal has COMMITTED: with or without us, the tasks run
            self._linger()
            return self.result("in_doubt", self._lost(as_livemove_error(error, "resuming the tasks")))
        await self._attempt(self._say_resumed, doubts)
        await releasing
        self.adapters.pace("background")
        for step in (self._end_restore, self._adopt, self._record_resumed, self._mend):
            await self._attempt(step, doubts)
        self.let_go()
        if (failure := await self._fill_in()) is not None:
            return self.result("in_doubt", failure)
        if doubts:
            doubt = InDoubt(f"the tasks run on {self.host}, and that is not finished: {doubts[0]}", doubts[0].hint)
            return self.result("in_doubt", doubt)
        return await self._release()

    async def _attempt(self, step: Callable[[], Awaitable[None]], doubts: list[LivemoveError]) -> None:
        try:
            await step()
        except Exception as error:
            doubts.append(as_livemove_error(error, "after the commit"))

    async def _let_out(self) -> None:
        if self._restore is not None:  # a recovery has no queue, and opens the gate when it knows that the tasks run
            await self.network.let_out()
            self.part("gate opened outwards")

    async def _connect(self) -> None:
        if self._fetcher is not None:
            self._fetcher.begin()
        if self._restore is None:
            await self._end_restore()
            await self._adopt()
            return
        async with asyncio.timeout(self.plan.deadlines.resume_s):
            await self._restore.connected()
        self.part("sockets take packets")

    async def _resume(self) -> None:
        if self._restore is not None:
            async with asyncio.timeout(self.plan.deadlines.resume_s):
                await self._restore.resumed()
            self.part("tasks run")

    async def _release_held(self) -> None:
        if not self.deeds.recorded("gate"):
            return  # a recovery of a half that had removed it already
        held = await self.network.release_arrivals()
        self.part("held packets released")
        if self._restore is not None:  # a recovery has held nothing
            self._report_hold(held)

    async def _say_resumed(self) -> None:
        if self.channel is not None:
            with contextlib.suppress(ChannelFailed):
                await self.channel.send(Resumed())

    async def _adopt(self) -> None:
        if not self._root_pid:
            self._root_pid = await self.runtime.adopt()

    async def _record_resumed(self) -> None:
        if self.journal.phase is Phase.COMMITTED:  # else this is a recovery that finds it resumed
            self.enter(Phase.RESUMED, durable=True)
            self.record_parts()

    async def _mend(self) -> None:
        """Without it connections are slower, and nothing is wrong with them."""
        try:
            await self.adapters.mend(self._root_pid)
        except OSError as error:
            self.warn(f"{self.host}: restored connections go on sending small segments: {error}")

    def _report_hold(self, report: HoldReport) -> None:
        if report.mode == "none":
            self.warn(f"{self.host} cannot hold packets (no NFQUEUE): those that arrived in the freeze were dropped")
        if lost := report.dropped_udp + report.dropped_other + report.kernel_dropped:
            self.warn(f"{self.host}: {lost} of {report.held_packets + lost} packets did not fit into the hold")

    async def _release(self) -> HalfResult:
        """The tasks run. See that the packets follow them; what is left to do are warnings at worst."""
        try:
            self._sockets = await self.network.sockets(self._root_pid)
            if not self.deeds.recorded("mover"):  # one that was in doubt had let go of them
                await self._draw_packets()
            self.warn(*await self.network.released({each.remote for each in self._sockets if each.remote_port}))
            self.files.claim()
        except (LivemoveError, OSError) as error:
            self.warn(f"after the move, on {self.host}: {error}")
        self.warn(*await self.deeds.undo(keep=("addresses", "mover", "restore", "connections", "namespace", "files")))
        self.finished(Phase.RELEASED)
        return self.result("moved", root_pid=self._root_pid, frozen_bytes=self._received_bytes, sockets=self._sockets)

    async def give_up(self, error: LivemoveError) -> HalfResult:
        """Before COMMITTED: fall silent, tell the source, kill what was restored behind the closed gate, undo."""
        self.adapters.pace("usual")
        self.abort(error)
        if not await self.fall_silent():
            # A host that does not have the addresses does not answer for them either.
            self.warn(*await self.deeds.undo(only=("restore", "addresses")))
        self.warn(*await self.deeds.undo(only=("mover",)))  # before the source does its part
        if self.channel is not None:
            answer = GaveUp() if isinstance(error, PeerAborted) else GiveUp(error=error.to_wire())
            with contextlib.suppress(ChannelFailed):
                await self.channel.send(answer)
        return await self.undo_rest(error)

    async def fall_silent(self) -> bool:
        """I2: answer for the addresses no more. ``False`` if that was not possible."""
        if not self.deeds.recorded("gate"):
            return True  # nothing has answered yet: the addresses come after the gate
        try:
            await self.network.set_gate(CLOSED)
        except LivemoveError as error:
            self.warn(f"closing the gate on {self.host}: {error}")
            return False
        return True

    async def undo_rest(self, error: LivemoveError) -> HalfResult:
        """After ABORTED: undo what is not undone yet. Also the way on for a recovery of a roll-back cut short."""
        try:
            await self.network.drop_arrivals()
        except LivemoveError as failure:
            self.warn(f"dropping held packets on {self.host}: {failure}")
        self.warn(*await self.deeds.undo())
        await self._close_memory()  # of one that was being prepared
        self.finished(Phase.ROLLED_BACK)
        return self.result("rolled_back", error)

    async def _remove_gate(self, _: dict[str, Any]) -> None:
        """I2: as long as anything is left behind it, the gate stays closed, lest the kernel answers with a RST."""
        if left := self.deeds.recorded("restore", "addresses"):
            raise NetworkChangeFailed(f"it stays closed, because this is not undone: {', '.join(left)}")
        await self.network.remove_gate()

    async def _discard(self, _: dict[str, Any]) -> None:
        """CRIU's hook reads ABORTED and CRIU kills what it restored; then the runtime forgets it."""
        await self.end_criu("restore", self._restore, self.plan.deadlines.release_s)
        await self.runtime.discard()
