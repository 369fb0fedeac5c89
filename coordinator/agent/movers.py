"""Puts a workload's address mover together for one host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from coordinator.agent.process import first_explaining_line, run
from coordinator.errors import LivemoveError
from coordinator.facts import MoverFacts, MoverSpec, RouterSpec
from coordinator.protocol import MigrationPlan
from netfix.errors import NetfixError
from netfix.frames import PacketFramePort
from netfix.movers.base import AddressMover, MoverFailedError, MovingAddress, Ran, Role
from netfix.movers.hook import HookMove, HookMover, hook_problem
from netfix.movers.l2 import Announcement, L2Mover
from netfix.movers.route import RouteMover, Router
from netfix.neighbours import RouteNeighbourhood, way_to

DESCRIBE_S = 10.0


def announcing_mover(plan: MigrationPlan, role: Role) -> L2Mover:
    """The mover that tells the segment, on the host that has that role, in the network namespace we are in."""
    here = plan.source if role == "source" else plan.destination
    announcements = [
        Announcement(
            address=move.address,
            mac=here.mac,
            frames=move.announce_at_source if role == "source" else move.announce_at_destination,
            probes=move.probe_at_destination,
        )
        for move in plan.addresses
    ]
    interface = here.interface if plan.namespace is None else plan.namespace.interface
    return L2Mover(role, PacketFramePort(interface), announcements, RouteNeighbourhood(interface))


def outside_mover(plan: MigrationPlan, role: Role) -> AddressMover | None:
    """The mover of a plan that changes something else than the segment, its end on the host that has that role."""
    spec, deadline_s = plan.workload.mover, plan.deadlines.divert_s
    here = plan.source if role == "source" else plan.destination
    if spec.kind == "l2":
        return None
    addresses = [
        MovingAddress(move.address, move.prefixlen, move.source_next_hop, move.destination_next_hop)
        for move in plan.addresses
    ]
    if spec.router is not None:
        return RouteMover(role, _router(spec.router), addresses, run_command, deadline_s=deadline_s)
    move = HookMove(plan.id, plan.workload.name, plan.source.name, plan.destination.name, here.interface)
    return HookMover(role, spec.hook, move, addresses, run_command, deadline_s=deadline_s)


async def describe_mover(spec: MoverSpec, addresses: Sequence[str], interface: str) -> MoverFacts:
    """See ``protocol.DescribeMover``."""
    if spec.router is None:
        return MoverFacts(problem=hook_problem(spec.hook) if spec.kind == "hook" else "")
    moving = [MovingAddress(address, 128 if ":" in address else 32) for address in addresses]
    mover = RouteMover("source", _router(spec.router), moving, run_command, deadline_s=DESCRIBE_S)
    onward = {address: passed_on(interface, address) for address in addresses}
    try:
        return MoverFacts(routes=await mover.routes(), onward=onward)
    except MoverFailedError as error:
        return MoverFacts(problem=error.message, onward=onward)


def passed_on(interface: str, address: str) -> str:
    """The interface to which this host passes on a packet to an address that comes by ``interface``; empty if it does
    not (kernel's ip-sysctl: ``forwarding`` of the interface, for IPv6 of the host)."""
    switch = "ipv6/conf/all" if ":" in address else f"ipv4/conf/{interface}"
    try:
        forwards = Path(f"/proc/sys/net/{switch}/forwarding").read_text().strip() != "0"
        return way_to(address) if forwards else ""
    except (OSError, NetfixError):
        return ""


async def run_command(argv: Sequence[str], environment: Mapping[str, str], deadline_s: float) -> Ran:
    """See ``netfix.movers.base.Commands``."""
    try:
        done = await run(argv, deadline_s=deadline_s, environment=environment)
    except LivemoveError as error:
        raise MoverFailedError(error.message, hint=error.hint) from error
    return Ran(done.status, first_explaining_line(done.stderr or done.stdout) if done.status else done.stdout)


def _router(spec: RouterSpec) -> Router:
    return Router(spec.address, spec.user, spec.port, spec.key, spec.known_hosts)
