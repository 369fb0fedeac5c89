"""The agent's request loop: reads calls from standard input, answers on standard output, and owns at most one half.

One agent process serves one session. When the session is gone, a half that runs goes on to its end by itself, because
the switch-over is between the two agents; a half that was only prepared is undone.
"""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from coordinator.agent import facts, movers, recover
from coordinator.agent.assembly import REAL_PARTS, AnyListener, Parts, Places, runtime_of
from coordinator.agent.destination import DestinationHalf
from coordinator.agent.files.left_over import LeftOver
from coordinator.agent.files.looking import Probes, listing
from coordinator.agent.half import ANY_REASON, as_livemove_error, uninterrupted
from coordinator.agent.recent_self_test import recent_self_test
from coordinator.agent.source import SourceHalf
from coordinator.errors import AgentFailed, Interrupted, LivemoveError, ProtocolError, WorkloadBusy
from coordinator.events import Event
from coordinator.facts import FilesFacts, HostFacts, MoverFacts, WorkloadFacts
from coordinator.journal import Journal, LiveLock, Role
from coordinator.protocol import (
    LINE_LIMIT_BYTES,
    REQUESTS,
    VERSION,
    Abort,
    Answers,
    AskFirewall,
    DescribeFiles,
    DescribeHost,
    DescribeMover,
    DescribeWorkload,
    DestinationReady,
    Done,
    FirewallDrops,
    HalfResult,
    Listing,
    ListMigrations,
    ListTree,
    MigrationPlan,
    MigrationRecords,
    PrepareDestination,
    PrepareSource,
    Recover,
    RunHalf,
    RunSelfTest,
    SelfTestResult,
    WhoAnswers,
    WithdrawProbes,
)
from coordinator.wire import decode, encode
from netfix.frames import PacketFramePort


class Owned:
    """The half this agent owns, with all that has to be closed when it has ended."""

    def __init__(self, half: SourceHalf | DestinationHalf, lock: LiveLock) -> None:
        self.half = half
        self.lock = lock
        self.listener: AnyListener | None = None
        self.run: asyncio.Task[HalfResult] | None = None
        #: The call that prepares it; cancelled by an ``Abort`` that comes meanwhile, and why.
        self.preparing = asyncio.current_task()
        self.given_up: Interrupted | None = None

    async def close(self) -> None:
        """Close channel, netlink sockets and journal, let go of CRIU and of the lock. What is on the host stays."""
        self.half.let_go()
        if self.listener is not None:
            await self.listener.close()
        if self.half.channel is not None:
            await self.half.channel.close()
        await self.half.network.close()
        self.half.journal.close()
        self.lock.release()


class Agent:
    """One agent. ``send`` gets every line that goes to the coordinator, as plain data."""

    def __init__(self, places: Places, send: Callable[[dict[str, Any]], None], parts: Parts = REAL_PARTS) -> None:
        self._places = places
        self._parts = parts
        self._send = send
        self._owned: Owned | None = None
        self._probes = Probes()
        self._lingering: list[asyncio.Future[None]] = []
        self._handlers: dict[type, Callable[[Any], Awaitable[object]]] = {
            DescribeHost: self._describe_host,
            DescribeWorkload: self._describe_workload,
            RunSelfTest: self._self_test,
            WhoAnswers: self._who_answers,
            DescribeMover: self._describe_mover,
            AskFirewall: self._ask_firewall,
            DescribeFiles: self._describe_files,
            ListTree: self._list_tree,
            WithdrawProbes: self._withdraw_probes,
            PrepareDestination: self._prepare_destination,
            PrepareSource: self._prepare_source,
            RunHalf: self._run_half,
            Abort: self._abort,
            ListMigrations: self._list_migrations,
            Recover: self._recover,
        }

    async def handle(self, line: bytes) -> None:
        """Answer one call, whatever happens in it."""
        number: object = None
        try:
            message = json.loads(line)
            number = message["id"]
            kind = REQUESTS.get(message["call"])
            if kind is None:
                raise ProtocolError(f"this agent knows no call {message['call']!r}")
            request = decode(kind, message["params"])
            async with asyncio.timeout(message.get("deadline_s")):
                reply = await self._handlers[kind](request)
            self._send({"id": number, "reply": encode(reply)})
        except LivemoveError as error:
            self._send({"id": number, "error": error.to_wire()})
        except TimeoutError:
            self._send({"id": number, "error": AgentFailed("the call did not end within its deadline").to_wire()})
        except Exception as error:  # the border of the agent: a defect is told, not lost
            self._send({"id": number, "error": AgentFailed(f"{type(error).__name__}: {error}").to_wire()})

    def emit(self, event: Event) -> None:
        """Send an event to the coordinator."""
        self._send({"event": encode(event)})

    async def session_lost(self) -> None:
        """The coordinator is gone and all calls have ended: undo what was only prepared. A half that runs beyond the
        deadline of its call goes on to its end."""
        self._probes.withdraw()
        if self._owned is not None and self._owned.run is not None:
            await asyncio.wait((self._owned.run,))
        await self._undo_prepared(Interrupted("the coordinator went away before the move began"))
        if self._lingering:
            await asyncio.wait(self._lingering)

    async def _describe_host(self, request: DescribeHost) -> HostFacts:
        return await facts.describe_host(request.interface, recover.unfinished(self._places.state))

    async def _describe_workload(self, request: DescribeWorkload) -> WorkloadFacts:
        moving = recover.unfinished(self._places.state, request.workload.name)
        found = await facts.describe_workload(
            request.workload, runtime_of(request.workload), moving[0] if moving else "", self._notice
        )
        if found.state == "running" and recover.holds_back(self._places.state, request.workload.name):
            return replace(found, state="stopped")
        return found

    def _notice(self, text: str) -> None:
        self.emit(Event(kind="notice", name="WARNING", host="", at_ms=0.0, detail=text))

    async def _self_test(self, request: RunSelfTest) -> SelfTestResult:
        return await recent_self_test(request.max_age_s)

    async def _who_answers(self, request: WhoAnswers) -> Answers:
        port = PacketFramePort(request.interface)
        try:
            macs = await port.who(request.frames, request.address, request.wait_s, settle_s=request.settle_s)
        finally:
            port.close()
        return Answers(macs=tuple(sorted(macs)))

    async def _describe_mover(self, request: DescribeMover) -> MoverFacts:
        return await movers.describe_mover(request.mover, request.addresses, request.interface)

    async def _ask_firewall(self, request: AskFirewall) -> FirewallDrops:
        return FirewallDrops(drops=facts.firewall_drops(request.interface, request.services))

    async def _describe_files(self, request: DescribeFiles) -> FilesFacts:
        problems = self._probes.offer(request.trees, request.nonce) if request.offer else {}
        left_over = LeftOver(self._places.state, request.workload)
        found = await facts.describe_files(request.trees, left_over, request.nonce)
        named = (replace(each, problem=each.problem or problems.get(each.path, "")) for each in found.trees)
        return replace(found, trees=tuple(named))

    async def _list_tree(self, request: ListTree) -> Listing:
        entries = await asyncio.to_thread(listing, request.path)
        return Listing(entries=gzip.compress(json.dumps(entries).encode(), compresslevel=1))

    async def _withdraw_probes(self, _: WithdrawProbes) -> Done:
        self._probes.withdraw()
        return Done()

    async def _prepare_destination(self, request: PrepareDestination) -> DestinationReady:
        owned = self._own(request.plan, "destination")
        try:
            owned.listener = await self._parts.listen(
                request.plan.destination.channel_address, request.credentials, request.plan.id
            )
            await owned.half.prepare()
            return DestinationReady(port=owned.listener.port)
        except BaseException as error:
            await self._undo_prepared(owned.given_up or error)
            if owned.given_up is not None:
                raise owned.given_up from error
            raise

    async def _prepare_source(self, request: PrepareSource) -> Done:
        plan = request.plan
        owned = self._own(plan, "source")
        try:
            link = await self._parts.connect(
                plan.destination.channel_address,
                request.port,
                request.credentials,
                plan.id,
                plan.deadlines.connect_s,
            )
            owned.half.attach(link)
            await owned.half.prepare()
            return Done()
        except BaseException as error:
            await self._undo_prepared(owned.given_up or error)
            if owned.given_up is not None:
                raise owned.given_up from error
            raise

    def _own(self, plan: MigrationPlan, role: Role) -> Owned:
        """Open the journal and become the live half of this migration on this host.

        The journal comes before the look at the others', so that of two that begin at once one sees the other."""
        if self._owned is not None:
            raise WorkloadBusy("this agent owns a half already")
        journal = Journal.create(self._places.state, plan.id, role, encode(plan))
        lock = LiveLock(journal.path.parent, role)
        lock.take()
        others = [other for other in recover.unfinished(self._places.state, plan.workload.name) if other != plan.id]
        self._owned = Owned(self._parts.halves[role](plan, journal, self._places, self.emit), lock)
        if others:
            raise WorkloadBusy(f"workload {plan.workload.name} is being moved by {others[0]}")
        return self._owned

    async def _run_half(self, _: RunHalf) -> HalfResult:
        if self._owned is None or self._owned.run is not None:
            raise ProtocolError("there is no prepared half to run")
        owned = self._owned
        owned.run = asyncio.create_task(self._run_owned(owned))
        return await asyncio.shield(owned.run)

    async def _run_owned(self, owned: Owned) -> HalfResult:
        try:
            if owned.listener is not None:
                owned.half.attach(await owned.listener.accept(owned.half.plan.deadlines.connect_s))
            return await owned.half.run()
        except ANY_REASON as error:
            return await uninterrupted(owned.half.give_up(as_livemove_error(error, "waiting for the source's agent")))
        finally:
            if owned.half.lingering is not None:
                self._lingering.append(owned.half.lingering)
            await owned.close()
            self._owned = None

    async def _abort(self, request: Abort) -> Done:
        """A half decides by itself whether it is too late; the answer is in the result of its ``RunHalf``."""
        if self._owned is None:
            return Done()
        owned = self._owned
        if owned.run is not None:
            owned.run.cancel()
            return Done()
        owned.given_up = Interrupted(request.reason)
        if owned.preparing is not None and not owned.preparing.done():
            owned.preparing.cancel()  # it undoes what it has done so far, and answers with this reason
            await asyncio.wait((owned.preparing,))
        await self._undo_prepared(owned.given_up)
        return Done()

    async def _undo_prepared(self, error: BaseException) -> None:
        if self._owned is None:
            return
        owned, self._owned = self._owned, None
        reason = error if isinstance(error, LivemoveError) else Interrupted(f"preparing: {error!r}")
        try:
            await owned.half.give_up(reason)
        finally:
            await owned.close()

    async def _list_migrations(self, _: ListMigrations) -> MigrationRecords:
        return MigrationRecords(records=recover.records(self._places.state))

    async def _recover(self, request: Recover) -> HalfResult:
        return await recover.recover(self._places, request, self.emit, self._parts.halves)


async def serve(places: Places) -> None:
    """Serve one session on standard input and output, to its end and to the end of a half that still runs."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=LINE_LIMIT_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    transport, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, sys.stdout)

    def send(data: dict[str, Any]) -> None:
        # Never waits: a session that stands still must not hold up a freeze. What a dead one cannot take is dropped.
        if not transport.is_closing():
            transport.write(json.dumps(data, separators=(",", ":")).encode() + b"\n")

    agent = Agent(places, send)
    send({"hello": VERSION})
    calls: set[asyncio.Task[None]] = set()
    while line := await reader.readline():
        task = asyncio.create_task(agent.handle(line))
        calls.add(task)
        task.add_done_callback(calls.discard)
    if calls:
        await asyncio.wait(calls)  # a half that runs goes on to its end, a preparation to where it can be undone
    await agent.session_lost()
    transport.close()


def main() -> None:
    """Entry point of a pushed agent."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    gc.freeze()  # what was imported stays: nobody looks through it again, neither in a freeze nor at the end
    asyncio.run(serve(Places()))
