"""Puts the halves together with their real adapters: the one place that knows which implementation is behind a door."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from coordinator.agent.channel import Channel, Listener, connect
from coordinator.agent.criu import HeldCriu
from coordinator.agent.destination import DestinationHalf
from coordinator.agent.files.left_over import LeftOver
from coordinator.agent.files.source import SyncedFiles
from coordinator.agent.files.target import ReceivedFiles
from coordinator.agent.half import Adapters
from coordinator.agent.images import RUN_DIR, TmpfsImageSpace
from coordinator.agent.memory.choose import choose_tracker
from coordinator.agent.memory.copying import MemorySource
from coordinator.agent.memory.filling import StoredMemory
from coordinator.agent.memory.memfds import Memfds
from coordinator.agent.memory.segments import segments_of
from coordinator.agent.memory.tmpfs_source import NoTmpfs, OwnTmpfs, TmpfsSource
from coordinator.agent.memory.tree import TreeTracker
from coordinator.agent.mending import mend_segment_sizes
from coordinator.agent.movers import announcing_mover, outside_mover
from coordinator.agent.namespaced import NamespacedNetwork
from coordinator.agent.network import NetfixNetwork, ServiceNetwork, tree_socket_inodes
from coordinator.agent.pacing import Pacer
from coordinator.agent.process import start_time, wait_gone
from coordinator.agent.runtimes.base import Runtime
from coordinator.agent.runtimes.oci import oci_runtime_of
from coordinator.agent.runtimes.podman import PodmanRuntime
from coordinator.agent.runtimes.process_tree import ProcessTree
from coordinator.agent.source import SourceHalf
from coordinator.errors import TrackingFailed
from coordinator.events import EventSink
from coordinator.facts import WorkloadSpec
from coordinator.journal import DEFAULT_STATE_DIR, Journal
from coordinator.protocol import Credentials, MigrationPlan
from netfix.address import NetlinkAddressBook
from netfix.conntrack import NetlinkConnectionTable
from netfix.delivery import LoopbackDelivery
from netfix.gate import NftGate
from netfix.hold import NfqueueHold
from netfix.movers.base import Role
from netfix.sockets import DiagSocketInventory

CRIU_END_DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class Places:
    """Where this host keeps journals (``state``, on disk) and image spaces (``run``, gone at a reboot)."""

    state: Path = DEFAULT_STATE_DIR
    run: Path = RUN_DIR


def runtime_of(workload: WorkloadSpec, expected_pids: tuple[int, ...] = ()) -> Runtime:
    """The runtime that a workload names."""
    if workload.runtime == "process":
        return ProcessTree(workload, expected_pids)
    if workload.runtime == "podman":
        return PodmanRuntime(workload)
    return oci_runtime_of(workload)


def real_adapters(plan: MigrationPlan, role: Role, places: Places) -> Adapters:
    """The doors of a half to this host."""
    images = TmpfsImageSpace(plan.id, places.run)
    left_over = LeftOver(places.state, plan.workload.name)
    return Adapters(
        runtime=runtime_of(plan.workload, plan.expected_pids),
        criu=HeldCriu(images.work, images.images),
        images=images,
        network=_network(plan, role),
        memory_source=lambda policy: MemorySource(policy, _track, clock=time.monotonic, tmpfs=_tmpfs),
        memory_destination=StoredMemory,
        pace=Pacer(),
        wait_gone=lambda pid, started: wait_gone(pid, started, CRIU_END_DEADLINE_S),
        start_time=start_time,
        mend=mend_segment_sizes,
        files_source=lambda: SyncedFiles(plan.trees, left_over, images.work),
        files_target=lambda: ReceivedFiles(plan.trees, left_over, images.work),
    )


def _network(plan: MigrationPlan, role: Role) -> ServiceNetwork:
    """The network of a workload in the host's namespace, or in its own."""
    here = plan.source if role == "source" else plan.destination
    table = NetlinkConnectionTable()
    own = plan.namespace
    outside = outside_mover(plan, role)

    def make() -> NetfixNetwork:
        interface = here.interface if own is None else own.interface
        return NetfixNetwork(
            interface,
            plan.addresses,
            gate=NftGate(plan.id, [move.address for move in plan.addresses], alone=own is not None),
            book=NetlinkAddressBook(),
            mover=announcing_mover(plan, role) if own is not None or outside is None else outside,
            inventory=DiagSocketInventory(),
            hold=NfqueueHold(),
            delivery=LoopbackDelivery(),
            table=table,
            inodes=tree_socket_inodes,
            sockets_tracked=own is None,
        )

    return make() if own is None else NamespacedNetwork(own, plan.namespace_parent, make, outside)


def _track(root_pid: int) -> TreeTracker:
    choice = choose_tracker()
    if choice.make is None:
        raise TrackingFailed(f"this kernel cannot tell which pages were written: {choice.reason}")
    if choice.name == "write_protect":
        return TreeTracker(root_pid, choice.make, segments_of(root_pid), Memfds())
    # Of shared memory, soft-dirty bits tell nothing: what is dirty in every round is better sent once, with the images.
    return TreeTracker(root_pid, choice.make)


def _tmpfs(root_pid: int) -> TmpfsSource:
    """Of shared memory, only one tracker knows what was written to."""
    with suppress(OSError):  # there is no fanotify, or too much of it
        if choose_tracker().name == "write_protect":
            return OwnTmpfs(root_pid)
    return NoTmpfs()


def source_half(plan: MigrationPlan, journal: Journal, places: Places, sink: EventSink) -> SourceHalf:
    """A source half on this host."""
    adapters = real_adapters(plan, "source", places)
    return SourceHalf(plan.source.name, plan, journal, adapters, sink=sink, clock=time.monotonic)


def destination_half(plan: MigrationPlan, journal: Journal, places: Places, sink: EventSink) -> DestinationHalf:
    """A destination half on this host."""
    adapters = real_adapters(plan, "destination", places)
    return DestinationHalf(plan.destination.name, plan, journal, adapters, sink=sink, clock=time.monotonic)


class AnyListener(Protocol):
    """The destination's end of the channel before the source has come; see ``channel.Listener``."""

    @property
    def port(self) -> int:
        """Where it listens."""

    async def accept(self, deadline_s: float) -> Channel:
        """The channel to the source half; raise ``ChannelFailed`` if it does not come within ``deadline_s``."""

    async def close(self) -> None:
        """Stop listening; an accepted channel stays. Idempotent."""


class Listen(Protocol):
    """See ``channel.Listener.open``."""

    async def __call__(self, address: str, credentials: Credentials, migration: str) -> AnyListener:
        """Listen on a free port of ``address``; raise ``ChannelFailed`` if that is not possible."""


class Connect(Protocol):
    """See ``channel.connect``."""

    async def __call__(
        self, address: str, port: int, credentials: Credentials, migration: str, deadline_s: float
    ) -> Channel:
        """Connect to the destination half and prove who we are; raise ``ChannelFailed``."""


HalfBuilder = Callable[[MigrationPlan, Journal, Places, EventSink], SourceHalf | DestinationHalf]


@dataclass(frozen=True, slots=True)
class Parts:
    """What an agent puts together: a builder of a half for each role, and the two ends of the channel."""

    halves: Mapping[str, HalfBuilder]
    listen: Listen
    connect: Connect


REAL_PARTS = Parts({"source": source_half, "destination": destination_half}, Listener.open, connect)
