"""The messages that coordinator and agents, and the two agents among themselves, speak.

Coordinator → agent: a ``Request`` subclass, whose type parameter names its reply. One JSON object a line over the SSH
session: ``{"id", "call", "params", "deadline_s"}``, answered by ``{"id", "reply"}`` or ``{"id", "error"}``; an agent
sends ``{"event"}`` lines in between. The agent's first line is ``{"hello": VERSION}``.
What the two agents say to each other is in ``agent/messages.py``. docs/protocol.md describes both;
raise ``VERSION`` with every change that an older side would misread.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

from coordinator.facts import (
    FilesFacts,
    FirewallDrop,
    HostFacts,
    MoverFacts,
    MoverSpec,
    NamespaceFacts,
    ServicePort,
    SocketFacts,
    Tree,
    WorkloadFacts,
    WorkloadSpec,
)
from coordinator.journal import Phase

VERSION = 1

#: A JSON line may be this long: facts of a host with 65 000 sockets fit, a runaway does not.
LINE_LIMIT_BYTES = 64 * 1024 * 1024

Reply = TypeVar("Reply")
Outcome = Literal["moved", "rolled_back", "in_doubt"]
Verdict = Literal["committed", "aborted", "unknown"]
Mode = Literal["stop-copy", "pre-copy", "post-copy", "hybrid"]
GiveUpMode = Literal["freeze", "abort", "post-copy"]


# ---------------------------------------------------------------- the plan both halves get


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressMove:
    """One service address with the frames that announce it and the destination's that ask who has it, built by the
    coordinator (``netfix.announce``), and the addresses of its family by which a router reaches the hosts, if any."""

    address: str
    prefixlen: int
    announce_at_destination: tuple[bytes, ...]
    announce_at_source: tuple[bytes, ...]
    probe_at_destination: tuple[bytes, ...] = ()
    source_next_hop: str = ""
    destination_next_hop: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A host as the plan names it; ``mac`` is that of its interface."""

    name: str
    interface: str
    channel_address: str
    mac: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """Bounds in seconds. ``copy_s``: all rounds of copying while the service runs. ``close_s``: how long a handshake or
    the last words of a closed connection are waited for. ``accept_s``: how long the service may take to accept the
    connections that wait for it. ``divert_s``: each call of a hook, each change on a router. ``settle_s``: how long the
    diverted source may work off what else it had received.
    ``freeze_s``: from the closed gate to STAGED, then the move is given up. ``resume_s``: from GO to RESUMED.
    ``fill_s``: until all memory is in the restored tasks."""

    connect_s: float = 10.0
    prepare_s: float = 60.0
    copy_s: float = 3600.0
    close_s: float = 2.0
    accept_s: float = 1.0
    divert_s: float = 5.0
    settle_s: float = 0.005
    freeze_s: float = 60.0
    abort_s: float = 2.0
    resume_s: float = 60.0
    release_s: float = 30.0
    fill_s: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPolicy:
    """How memory is moved. ``max_freeze_ms``: pre-copy freezes when its forecast fits; ``max_rounds`` and
    ``max_factor`` (bytes sent as a multiple of the first round) bound it; ``give_up``: what to do when it does not
    converge."""

    mode: Mode = "stop-copy"
    max_freeze_ms: float = 50.0
    max_rounds: int = 12
    max_factor: float = 4.0
    give_up: GiveUpMode = "freeze"


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationPlan:
    """All that the halves need; nothing else is asked of the coordinator once they are prepared. ``expected_pids`` are
    the pids and thread ids of the workload on the source, the root's first;
    ``track_connections``: the destination has a connection table that must know the workload's connections;
    ``namespace``: the workload's own network namespace, to be attached to ``namespace_parent`` on the destination;
    ``trees``: the directories that are to be copied, or that both hosts share."""

    id: str
    workload: WorkloadSpec
    source: Endpoint
    destination: Endpoint
    addresses: tuple[AddressMove, ...]
    image_space_bytes: int
    expected_pids: tuple[int, ...]
    deadlines: Deadlines
    memory: MemoryPolicy = field(default_factory=MemoryPolicy)
    track_connections: bool = False
    namespace: NamespaceFacts | None = None
    namespace_parent: str = ""
    trees: tuple[Tree, ...] = ()

    @property
    def mover_s(self) -> float:
        """How long one host's part of a mover may take, in seconds: none where it is only to send frames."""
        return 0.0 if self.workload.mover.kind == "l2" else self.deadlines.divert_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """One side's TLS identity and the only certificate it accepts from the other (all PEM)."""

    certificate: bytes
    key: bytes
    peer_certificate: bytes


# ---------------------------------------------------------------- coordinator → agent


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(Generic[Reply]):
    """Base of the calls; the type parameter names the reply's type."""

    reply: ClassVar[type] = type(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribeHost(Request[HostFacts]):
    """Gather the facts of this host. Read-only."""

    interface: str
    reply: ClassVar[type] = HostFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribeWorkload(Request[WorkloadFacts]):
    """Say whether and how this host runs the workload, and what of it could not be moved. Read-only."""

    workload: WorkloadSpec
    reply: ClassVar[type] = WorkloadFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTestResult:
    """``ok`` if a process with a TCP connection was dumped, restored, and its connection went on; ``any_uid`` if that
    was one of another uid than root."""

    ok: bool
    any_uid: bool = False
    problem: str = ""
    dump_ms: float = 0.0
    restore_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSelfTest(Request[SelfTestResult]):
    """Dump and restore a small process with a TCP connection on this host's loopback; a success that is no older than
    ``max_age_s`` will do."""

    max_age_s: float = 0.0
    reply: ClassVar[type] = SelfTestResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The MAC addresses that answered for an address."""

    macs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WhoAnswers(Request[Answers]):
    """Ask the segment who has an address (ARP probe, neighbour solicitation), with ready frames.

    Listens for ``wait_s``, or for ``settle_s`` after the first answer."""

    interface: str
    address: str
    frames: tuple[bytes, ...]
    wait_s: float
    settle_s: float
    reply: ClassVar[type] = Answers


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribeMover(Request[MoverFacts]):
    """Say whether this host's end of a mover could work, for addresses without prefix length. Packets of a router come
    by ``interface``. Read-only."""

    mover: MoverSpec
    addresses: tuple[str, ...]
    interface: str
    reply: ClassVar[type] = MoverFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class FirewallDrops:
    """Those of the ports asked for that no client would get through to."""

    drops: tuple[FirewallDrop, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AskFirewall(Request[FirewallDrops]):
    """Say which of these ports this host's firewall drops on an interface, as far as nftables tells. Read-only."""

    interface: str
    services: tuple[ServicePort, ...]
    reply: ClassVar[type] = FirewallDrops


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribeFiles(Request[FilesFacts]):
    """Say what a workload's trees are on this host. ``nonce`` names the probes in what is shared: with ``offer`` they
    are made first, and stay until ``WithdrawProbes`` or the end of the session. Else it is read-only."""

    workload: str
    trees: tuple[Tree, ...]
    nonce: str
    offer: bool
    reply: ClassVar[type] = FilesFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A digest of each entry of a tree, by its path in the tree; gzipped JSON."""

    entries: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ListTree(Request[Listing]):
    """List a tree, so that two can be compared. Read-only."""

    path: str
    reply: ClassVar[type] = Listing


@dataclass(frozen=True, slots=True, kw_only=True)
class DestinationReady:
    """The destination half is prepared and listens for the source half."""

    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareDestination(Request[DestinationReady]):
    """Image space, closed gate, silent address, listening channel."""

    plan: MigrationPlan
    credentials: Credentials
    reply: ClassVar[type] = DestinationReady


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """Nothing to tell but that it is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WithdrawProbes(Request[Done]):
    """Remove what ``DescribeFiles`` has put into shared trees."""

    reply: ClassVar[type] = Done


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareSource(Request[Done]):
    """Image space, open gate, channel to the destination half connected."""

    plan: MigrationPlan
    credentials: Credentials
    port: int
    reply: ClassVar[type] = Done


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTime:
    """When a half entered a phase (milliseconds since its run began) and for how long it was in it."""

    name: str
    start_ms: float
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """One round of copying memory while the service runs."""

    n: int
    pages: int
    bytes: int
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfResult:
    """How a half ended. ``phase`` is its journal's last; ``error`` is an error on the wire (``LivemoveError``)."""

    outcome: Outcome
    phase: Phase
    phases: tuple[PhaseTime, ...] = ()
    freeze_ms: float = 0.0
    frozen_bytes: int = 0
    mode: Mode | None = None
    rounds: tuple[RoundResult, ...] = ()
    pre_copy_bytes: int = 0
    sockets: tuple[SocketFacts, ...] = ()
    root_pid: int = 0
    warnings: tuple[str, ...] = ()
    error: dict[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHalf(Request[HalfResult]):
    """Run the prepared half to its end: the source half drives, the destination half follows."""

    reply: ClassVar[type] = HalfResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort(Request[Done]):
    """Give the running or prepared half up, if it is not committed; its ``RunHalf`` then returns rolled_back."""

    reason: str
    reply: ClassVar[type] = Done


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationRecord:
    """What a host's journal says of one migration. ``live``: a half of it is running at this moment."""

    id: str
    role: Literal["source", "destination"]
    workload: str
    source: str
    destination: str
    phase: Phase
    live: bool
    opened_at: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationRecords:
    """The migrations a host knows, oldest first."""

    records: tuple[MigrationRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListMigrations(Request[MigrationRecords]):
    """Read the journals of this host. Read-only."""

    reply: ClassVar[type] = MigrationRecords


@dataclass(frozen=True, slots=True, kw_only=True)
class Recover(Request[HalfResult]):
    """Finish or undo this host's part of a migration whose half is gone; waits for a live half to end by itself.

    ``verdict`` is what the other host's journal says, ``unknown`` if it was not asked. A source knows by itself; a
    staged destination without a verdict answers in_doubt and changes nothing."""

    id: str
    verdict: Verdict
    wait_s: float
    reply: ClassVar[type] = HalfResult


# A dataclass with slots is a second class of its name, made after the first: it is the one that stays.
REQUESTS: dict[str, type[Request[Any]]] = {kind.__name__: kind for kind in Request.__subclasses__()}
