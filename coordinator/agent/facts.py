"""What preflight wants to know of this host and of a workload on it. Read-only; decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from coordinator.agent.files.left_over import LeftOver
from coordinator.agent.files.looking import describe_tree
from coordinator.agent.files.trees import missing_source, tree_obstacles, trees_of
from coordinator.agent.images import memory_available_bytes
from coordinator.agent.memory.choose import choose_tracker
from coordinator.agent.network import socket_facts, tree_socket_inodes
from coordinator.agent.obstacles import obstacles, socket_obstacles
from coordinator.agent.own_namespace import own_namespace
from coordinator.agent.process import first_explaining_line, run
from coordinator.agent.runtimes.base import Runtime
from coordinator.agent.runtimes.oci import stray_processes
from coordinator.agent.tasks import PROC, all_ids, memory_bytes, process_tree, threads
from coordinator.errors import CommandFailed
from coordinator.facts import (
    CONTAINER_RUNTIMES,
    CriuFacts,
    FilesFacts,
    FirewallDrop,
    HostFacts,
    InterfaceFacts,
    LeftoverFacts,
    ServicePort,
    Tree,
    WorkloadFacts,
    WorkloadSpec,
)
from netfix.address import NetlinkAddressBook
from netfix.conntrack import NetlinkConnectionTable
from netfix.errors import NetfixError, NoSuchInterfaceError
from netfix.firewall import Service, drops, read_ruleset
from netfix.gate import find_gates
from netfix.inventory import findings, other_sockets
from netfix.leftovers import NftLeftoverFinder
from netfix.sockets import DiagSocketInventory, owned_by

#: Bits of linux/capability.h that CRIU and netfix need.
_CAPABILITIES = {
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_RESOURCE": 24,
    "CAP_CHECKPOINT_RESTORE": 40,
}
#: ``criu check --feature``: time namespaces let CLOCK_MONOTONIC go on without a jump on the other host; non-cooperative
#: userfaultfd lets memory follow behind the restored tasks.
_FEATURES = ("timens", "uffd-noncoop")


async def describe_host(interface: str, unfinished: tuple[str, ...]) -> HostFacts:
    """Gather the facts of this host; ``interface`` is the one the configuration names."""
    nf_tables, leftovers = await _firewall(unfinished)
    tracker = choose_tracker()
    return HostFacts(
        hostname=socket.gethostname(),
        identity=_identity(),
        kernel=platform.release(),
        machine=platform.machine(),
        python=platform.python_version(),
        euid=os.geteuid(),
        missing_capabilities=missing_capabilities(),
        criu=await _criu(),
        runtimes={name: version for name in CONTAINER_RUNTIMES if (version := await _version(name))},
        cgroup=cgroup_mode(),
        nf_tables=nf_tables,
        interface=await _interface(interface),
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        memory_available_bytes=memory_available_bytes(),
        leftovers=leftovers,
        unfinished=unfinished,
        agent_rss_bytes=resident_bytes(),
        taken_pids=tuple(all_ids()),
        tracker=tracker.name,
        tracker_problem="" if tracker.make else tracker.reason,
        tracks_connections=await _tracks_connections(),
    )


def _identity() -> str:
    """Two hosts never share all of these, not even two hosts of one kernel."""
    boot_id = (PROC / "sys/kernel/random/boot_id").read_text().strip()
    namespaces = [(PROC / "self/ns" / name).stat().st_ino for name in ("net", "pid")]
    return f"{boot_id}/{namespaces[0]}/{namespaces[1]}"


def missing_capabilities() -> tuple[str, ...]:
    """The capabilities this agent lacks, of those CRIU and netfix need (capabilities(7))."""
    for line in (PROC / "self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            effective = int(line.split()[1], 16)
            return tuple(name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1)
    return tuple(_CAPABILITIES)


def resident_bytes() -> int:
    """Resident memory of this agent."""
    return int((PROC / "self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cgroup_mode(root: Path = Path("/sys/fs/cgroup")) -> Literal["v1", "v2", "hybrid", "none"]:
    """How control groups are mounted (kernel Documentation/admin-guide/cgroup-v2.rst)."""
    if (root / "cgroup.controllers").exists():
        return "v2"
    if (root / "unified" / "cgroup.controllers").exists():
        return "hybrid"
    return "v1" if root.exists() and any(root.iterdir()) else "none"


async def _criu() -> CriuFacts | None:
    path = shutil.which("criu")
    if path is None:
        return None
    version = await run([path, "--version"])
    words = version.stdout.split()
    check = await run([path, "check"])
    problem = "" if check.status == 0 else first_explaining_line(check.stderr or check.stdout)
    missing = [name for name in _FEATURES if (await run([path, "check", "--feature", name])).status != 0]
    return CriuFacts(path=path, version=words[1] if len(words) > 1 else "", missing=tuple(missing), problem=problem)


async def _version(program: str) -> str:
    if shutil.which(program) is None:
        return ""
    with contextlib.suppress(CommandFailed):
        words = (await run([program, "--version"])).stdout.split()
        return next((word for word in words if word[:1].isdigit()), "unknown")
    return ""


async def _firewall(unfinished: tuple[str, ...]) -> tuple[bool, tuple[LeftoverFacts, ...]]:
    """Whether nf_tables can be used, and what others left in it. Gates of unfinished migrations are told as such."""
    try:
        await find_gates()
        found = await NftLeftoverFinder().find()
    except NetfixError:
        return False, ()
    ours = {f"livemove-{migration}" for migration in unfinished}
    return True, tuple(
        LeftoverFacts(kind=item.kind, detail=item.detail, hint=item.hint) for item in found if item.table not in ours
    )


async def _tracks_connections() -> bool:
    table = NetlinkConnectionTable()
    try:
        return await table.tracks()
    finally:
        table.close()


def firewall_drops(interface: str, services: tuple[ServicePort, ...]) -> tuple[FirewallDrop, ...]:
    """See ``protocol.AskFirewall``. Without nf_tables, which is a finding of its own, nothing is known."""
    try:
        ruleset, index = read_ruleset(), socket.if_nametoindex(interface)
    except (NetfixError, OSError):
        return ()
    chains = {
        each: drops(ruleset, Service(each.protocol, each.address, each.port), interface, index) for each in services
    }
    return tuple(FirewallDrop(service=service, chain=chain) for service, chain in chains.items() if chain)


async def _interface(name: str) -> InterfaceFacts | None:
    book = NetlinkAddressBook()
    try:
        record = await book.interface(name)
        addresses = await book.on_interface(name)
    except NoSuchInterfaceError:
        return None
    finally:
        book.close()
    return InterfaceFacts(
        name=name,
        mac=record.mac,
        up=record.up,
        mtu=record.mtu,
        addresses=tuple(f"{address.address}/{address.prefixlen}" for address in addresses),
    )


async def describe_workload(
    workload: WorkloadSpec, runtime: Runtime, moving: str, report: Callable[[str], None]
) -> WorkloadFacts:
    """How this host sees a workload. ``report`` gets what could not be read, without which the rest still holds."""
    addresses = await _addresses(workload)
    try:
        tasks = await runtime.find()
        definition = await runtime.definition()
    except CommandFailed as error:
        report(str(error))
        return WorkloadFacts(state="absent", addresses=addresses, runtime_problem=error.message, moving=moving)
    trees = trees_of(workload, definition.mounts)
    common = {
        "addresses": addresses,
        "moving": moving,
        "bundle_present": definition.present,
        "bundle_problem": definition.problem or missing_source(definition.mounts, trees),
        "bundle_digest": definition.digest,
        "trees": trees,
    }
    # A plain process is this workload only where its address is: the same pid may run anything on another host.
    if tasks.state != "running" or (workload.runtime == "process" and not addresses):
        state = tasks.state if tasks.state != "running" else "absent"
        path = definition.network
        taken = str(path) if path is not None and path.exists() else ""
        stray = _stray(workload) if state == "absent" else ""
        return WorkloadFacts(state=state, namespace_taken=taken, runtime_problem=stray, **common)  # type: ignore[arg-type]
    own = own_namespace(workload, definition.network, tasks.root_pid)
    if own.facts is not None:
        its_own = set(workload.addresses) & set(own.facts.addresses)
        common["addresses"] = dict.fromkeys(its_own, (own.facts.interface,))
    tree = process_tree(tasks.root_pid)
    thread_ids = [thread for pid in tree for thread in threads(pid)]
    inodes = tree_socket_inodes(tasks.root_pid)
    bare = [address.partition("/")[0] for address in workload.addresses]
    with own.entered():
        inventory = DiagSocketInventory()
        try:
            records = await inventory.sockets()
            found = findings(records, await other_sockets(), moving=bare, inodes=inodes)
        finally:
            inventory.close()
    return WorkloadFacts(
        state="running",
        root_pid=tasks.root_pid,
        pids=tuple(dict.fromkeys([*tree, *thread_ids])) if workload.runtime == "process" else tuple(tree),
        memory_bytes=memory_bytes(tree),
        sockets=socket_facts(owned_by(records, inodes)),
        executable=_executable(tasks.root_pid),
        namespace=own.facts,
        obstacles=(
            *([own.obstacle] if own.obstacle is not None else []),
            *definition.obstacles,
            *tree_obstacles(workload, definition.mounts),
            *obstacles(workload, tree, missing_capabilities()),
            *socket_obstacles(found),
        ),
        **common,  # type: ignore[arg-type]
    )


async def describe_files(trees: tuple[Tree, ...], left_over: LeftOver, nonce: str) -> FilesFacts:
    """The trees of a workload on this host; see ``protocol.DescribeFiles``."""
    found = [await asyncio.to_thread(describe_tree, tree, left_over, nonce) for tree in trees]
    return FilesFacts(rsync=await rsync_version(), trees=tuple(found))


async def rsync_version() -> str:
    """The version of rsync; empty if there is none."""
    if shutil.which("rsync") is None:
        return ""
    return (await run(["rsync", "--version"])).stdout.split()[2]


def _stray(workload: WorkloadSpec) -> str:
    """What is left of a container that its runtime does not know."""
    if workload.bundle is None or workload.container is None:
        return ""
    pids = stray_processes(Path(workload.bundle), workload.container)
    named = f"{workload.runtime} does not know the container {workload.container}"
    return f"{named}, and its control group has processes: {', '.join(map(str, pids))}" if pids else ""


async def _addresses(workload: WorkloadSpec) -> dict[str, tuple[str, ...]]:
    book = NetlinkAddressBook()
    try:
        places = {address: await book.find(address.partition("/")[0]) for address in workload.addresses}
        return {address: tuple(record.interface for record in found) for address, found in places.items() if found}
    finally:
        book.close()


def _executable(pid: int) -> str:
    try:
        return str((PROC / str(pid) / "exe").readlink())
    except OSError:
        return ""
