"""Two machines and one workload: what is where, who answers, and the invariants, looked at after every change.

A broken invariant is written down in ``World.broken`` rather than raised: the halves would take an exception for a
failed step and roll back.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from coordinator.agent.fakes.workload import Page, Workload
from coordinator.protocol import MigrationPlan
from netfix.address import AddressRecord, FakeAddressBook, InterfaceRecord
from netfix.conntrack_entry import CONFIRMED, ESTABLISHED, SEEN_REPLY, TCP, Connection, Flow, TcpInfo
from netfix.frames import FakeFramePort
from netfix.gate import GateState
from netfix.hold import FakeHold
from netfix.hold_buffer import OTHER, HeldPacket
from netfix.movers.fake import FakeWay
from netfix.sockets import SocketRecord

#: ``held``: restored, and has never run. Frozen and held copies have their sockets, an absent one has none.
Copy = Literal["absent", "running", "frozen", "held"]


#: The connection of the service that the source's firewall knows.
_INWARD = Flow("192.0.2.99", 50000, "192.0.2.200", 7000)
CONNECTION = Connection(TCP, _INWARD, _INWARD.reversed, SEEN_REPLY | CONFIRMED, 1000, tcp=TcpInfo(ESTABLISHED))


def decision(journal: Path) -> bool | None:
    """What a journal tells the hook: COMMITTED, ABORTED, or nothing yet. Whole lines only, the first one counts."""
    for line in journal.read_text().split("\n")[:-1]:
        if '"phase":"COMMITTED"' in line:
            return True
        if '"phase":"ABORTED"' in line:
            return False
    return None


@dataclass
class Machine:
    """One host. What is here survives the agent that made it."""

    name: str
    interface: str
    state: Path
    copy: Copy = "absent"
    memory: dict[Page, bytes] = field(default_factory=dict)
    missing: set[Page] = field(default_factory=set)  # a task that touches one of them waits
    keepers: set[str] = field(default_factory=set)  # who has a userfaultfd: without any, missing pages read as zero
    daemon: Callable[[Page], Awaitable[bool]] | None = None  # has the filler bring in a page
    trackers: int = 0
    refusal: str = ""  # why nothing can be hidden from CRIU here
    registered: bool = False  # the runtime knows the workload
    gates: dict[str, GateState] = field(default_factory=dict)
    files: dict[str, bytes] | None = None  # the image space
    volume: int | None = None  # what the service has written to its files
    left_over: bool = False  # the volume is remembered as an old one
    commands: dict[int, asyncio.Task[int]] = field(default_factory=dict)
    helpers: dict[int, asyncio.Task[int]] = field(default_factory=dict)  # filler and guard
    tracked: dict[object, Connection] = field(default_factory=dict)  # the connection table
    holds: list[FakeHold] = field(default_factory=list)  # that a living agent has open
    pending: list[SocketRecord] = field(default_factory=list)  # sockets of the workload in which something waits

    def __post_init__(self) -> None:
        """An interface up, with no address of the service."""
        link = InterfaceRecord(name=self.interface, index=2, mac="02:00:5e:10:00:01", up=True, mtu=1500)
        self.book = FakeAddressBook([link])
        self.port = FakeFramePort()

    @property
    def answers(self) -> bool:
        """Whether it answers ARP and NDP for the service address."""
        return bool(self.book.records) and all(gate.answering for gate in self.gates.values())

    @property
    def passes(self) -> bool:
        """Whether packets to the service address reach sockets, or the kernel that has none and answers with a RST."""
        open_gates = all(gate.passing and gate.queue is None for gate in self.gates.values())
        return bool(self.book.records) and open_gates

    @property
    def queues(self) -> bool:
        """Whether packets to the service address go into a queue."""
        return bool(self.book.records) and any(gate.queue is not None for gate in self.gates.values())

    @property
    def remains(self) -> list[str]:
        """What a migration must not leave behind (I5)."""
        found = [f"gate {name}" for name in self.gates]
        found += ["image space"] if self.files is not None else []
        found += [f"command {pid}" for pid in (*self.commands, *self.helpers)]
        found += [f"the copy is {self.copy}"] if self.copy in ("frozen", "held") else []
        found += ["a tracker in the tasks"] if self.trackers else []
        found += [f"{len(self.missing)} pages not filled in"] if self.missing and self.copy != "absent" else []
        found += ["a queue"] if self.holds else []
        found += [str(path) for path in self.state.rglob("*") if path.is_file() and path.suffix != ".jsonl"]
        if self.copy == "absent":
            found += ["address"] if self.book.records else []
            found += ["an entry of the runtime"] if self.registered else []
            found += ["a tracked connection"] if self.tracked else []
            found += ["files nobody remembers"] if self.volume is not None and not self.left_over else []
        return found


class World:
    """Source and destination of one plan, with the workload running on the source."""

    def __init__(self, folder: Path, plan: MigrationPlan) -> None:
        self.plan = plan
        self.source, self.destination = (
            Machine(end.name, end.interface, folder / end.name) for end in (plan.source, plan.destination)
        )
        for move in plan.addresses:
            self.source.book.records.append(AddressRecord(move.address, move.prefixlen, plan.source.interface))
        self.workload = Workload()
        self.source.tracked[CONNECTION.key] = CONNECTION
        #: For the movers other than l2: which hosts draw packets.
        self.way = FakeWay()
        self.source.copy, self.source.memory, self.source.registered = "running", self.workload.memory, True
        self.source.volume = 0
        #: The memory as it was frozen, which is what has to run on the other side.
        self.frozen: dict[Page, bytes] = {}
        #: Packets that peers have sent, and those of them that the service got or nobody did: they are sent again.
        self.packets = itertools.count(1)
        self.delivered: list[int] = []
        #: How these packets begin, where that matters.
        self.packet_head = b""
        self.dropped: list[int] = []
        #: Whether the tasks were killed because their memory could not be had any more.
        self.killed = False
        #: Set when the agents can no longer hear of each other: then an agent that is alive cannot know whether the
        #: other host still answers, and of two hosts that answer one is about to find out.
        self.parted = False
        self.broken: list[str] = []
        self.history: list[str] = []
        self.pids = itertools.count(1000)

    def machine(self, name: str) -> Machine:
        """The machine of that name."""
        return self.source if name == self.source.name else self.destination

    @property
    def committed(self) -> bool:
        """Whether the commit point is passed, as a hook would read it."""
        return any(decision(journal) is True for journal in self.source.state.glob("*/source.jsonl"))

    def set_copy(self, machine: Machine, copy: Copy) -> None:
        """CRIU or the kernel does something to the tasks."""
        if copy == "frozen":
            self.work()
            self.frozen = dict(machine.memory)
        machine.copy = copy
        if copy == "absent":
            machine.memory, machine.missing = {}, set()
            machine.keepers.clear()
        self.changed(f"{machine.name}: the copy is {copy}")

    def spawn(self, machine: Machine, work: Coroutine[Any, Any, int]) -> asyncio.Task[int]:
        """Start a helper's process, which belongs to no agent."""
        pid = next(self.pids)
        task = machine.helpers[pid] = asyncio.ensure_future(work)
        task.add_done_callback(lambda _: machine.helpers.pop(pid))
        return task

    def work(self) -> None:
        """The service goes on, if it runs: it writes, discards, forks."""
        if self.source.copy == "running":
            self.workload.work()
            self.source.volume = (self.source.volume or 0) + 1

    def packet(self) -> None:
        """A peer sends a packet to the host that answers (I4: the service gets it once, or it is sent again).

        With a service that was killed its connections are gone: they end as those of any killed process."""
        if self.killed:
            return
        number = next(self.packets)
        for machine in self._drawing():
            if machine.queues and machine.holds:
                machine.holds[-1].arrive(HeldPacket(number, OTHER, 100, head=self.packet_head))
            elif machine.passes:
                self.deliver(machine, number)
            else:
                self.dropped.append(number)

    def _drawing(self) -> list[Machine]:
        """The machines that a packet comes to: those that answer, or the one that draws it in another way."""
        if self.plan.workload.mover.kind == "l2":
            return [machine for machine in (self.source, self.destination) if machine.answers]
        drawing = [self.destination] if "destination" in self.way.attracting else []
        return drawing or ([self.source] if "source" in self.way.attracting else [])

    def deliver(self, machine: Machine, number: int) -> None:
        """A packet reaches the service's socket on a machine."""
        self._check(f"I4: packet {number} comes to a {machine.copy} copy on {machine.name}", machine.copy == "running")
        known = CONNECTION.key in machine.tracked or not self.plan.track_connections
        self._check(f"I4: packet {number} is unknown to the firewall of {machine.name}", known)
        self._check(f"I4: packet {number} is delivered twice", number not in self.delivered)
        self.delivered.append(number)

    def changed(self, what: str) -> None:
        """Look at every invariant after a change."""
        self.history.append(what)
        self.packet()
        source, destination, committed = self.source, self.destination, self.committed
        self._check("I1: two copies are runnable", (source.copy, destination.copy) != ("running", "running"))
        self._check("I2: two hosts answer", self.parted or not (source.answers and destination.answers))
        for machine in (source, destination):
            reset = machine.passes and machine.copy == "absent" and not self.killed
            self._check(f"I2: {machine.name} sends a RST into live connections", not reset)
        self._check("I3: the source runs after the commit point", not (committed and source.copy == "running"))
        self._check("I3: the source cannot resume", committed or source.copy != "absent")
        self._check("I1: the destination ran before the commit point", committed or destination.copy != "running")
        self._look_at_memory(destination)

    def _look_at_memory(self, machine: Machine) -> None:
        """I4 for memory: what is there is what was frozen, and what is not there yet cannot be taken for zeroes."""
        if machine.copy != "running" or machine is not self.destination:
            return
        there = {page: content for page, content in self.frozen.items() if page not in machine.missing}
        self._check("I4: the destination has other memory than the source had", machine.memory == there)
        self._check("I4: the destination has other files than the source had", machine.volume == self.source.volume)
        self._check("I4: missing pages read as zero", not machine.missing or bool(machine.keepers))

    def _check(self, what: str, holds: bool) -> None:
        if not holds:
            self.broken.append(f"{what}, after: {self.history[-1]}")


class AgentKilled(BaseException):
    """What runs in a killed agent stops here, without any cleaning up."""


class Life:
    """One agent process: its awaits are counted, and at the one that is chosen something happens to it.

    ``steps`` is how many it has made; at number ``stop_at`` ``stop`` is called, for instance ``kill``."""

    def __init__(self, world: World, machine: Machine) -> None:
        self.world = world
        self.machine = machine
        self.steps = 0
        self.verbs: list[str] = []
        self.stop_at = 0
        self.stop: Callable[[], None] = self.kill
        self.fail_at = 0
        self.dead = False
        #: What the kernel does when the process ends: locks are dropped, connections closed.
        self.at_death: list[Callable[[], None]] = []

    def kill(self) -> None:
        """End this process as SIGKILL does."""
        self.dead = True
        self.world.parted = True
        for release in self.at_death:
            release()

    async def checkpoint(self) -> None:
        """An await of the agent: the only places where something can come between."""
        self._alive()
        self.steps += 1
        if self.steps == self.stop_at:
            self.stop()
        await asyncio.sleep(0)
        self._alive()

    async def verb(self, name: str, failure: Exception) -> None:
        """The await before a verb of an adapter takes effect; it fails if it is the one chosen by ``fail_at``."""
        await self.checkpoint()
        self.verbs.append(name)
        if len(self.verbs) == self.fail_at:
            raise failure

    def step(self, name: str, failure: Exception) -> None:
        """As ``verb``, for what an agent does in a thread or without waiting."""
        self._alive()
        self.steps += 1
        if self.steps == self.stop_at:
            self.stop()
        self._alive()
        self.verbs.append(name)
        if len(self.verbs) == self.fail_at:
            raise failure

    async def done(self, what: str) -> None:
        """A verb has taken effect: look at the invariants; the await after it."""
        self.world.changed(f"{self.machine.name}: {what}")
        await self.checkpoint()

    async def sleep(self, delay_s: float) -> None:
        """``asyncio.sleep`` of this process."""
        await self.checkpoint()
        await asyncio.sleep(delay_s)
        self._alive()

    def _alive(self) -> None:
        if self.dead:
            raise AgentKilled
