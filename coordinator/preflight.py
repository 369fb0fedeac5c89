"""Pure: facts → findings. What each code means is in ``findings.py`` and docs/checks.md.

``host_findings`` looks at one host by itself (``livemove doctor``), ``move_findings`` at a move (``check``,
``migrate``), which includes both its hosts. Nothing here asks anybody anything: ``doctor.py`` gathers the facts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from ipaddress import IPv6Address, ip_address, ip_interface

from coordinator.facts import (
    CONTAINER_RUNTIMES,
    CriuFacts,
    HostFacts,
    LeftoverFacts,
    SocketFacts,
    WorkloadFacts,
)
from coordinator.findings import Finding, finding, from_error, from_obstacle, in_order
from coordinator.move_facts import MoveFacts, running_on
from coordinator.obstacles import NEEDS_CAP_SYS_RESOURCE
from coordinator.plan import id_part, image_space_bytes, namespace_parent
from coordinator.preflight_addresses import address_findings
from coordinator.preflight_files import file_findings
from coordinator.preflight_namespace import namespace_findings
from coordinator.preflight_runtime import runtime_findings
from coordinator.protocol import SelfTestResult

_MIB = 1024 * 1024
_OLDEST_PYTHON = (3, 11)
_FIRST_KERNEL_WITHOUT_PASSCRED = (6, 16)
_FIRST_CRIU_WITHOUT_PASSCRED = (4, 2)
#: Linux 4.20 was followed by 5.0, 5.19 by 6.0, 6.19 by 7.0; ten releases are a little less than two years.
_RELEASES_PER_MAJOR = 20
_MUCH_OLDER_RELEASES = 10
#: Runtimes that must be installed; a plain process needs none.
_INSTALLED_RUNTIMES = frozenset(CONTAINER_RUNTIMES)


def host_findings(
    host: str, interface: str, facts: HostFacts, self_test: SelfTestResult | None, runtimes: Iterable[str]
) -> tuple[Finding, ...]:
    """Whether a host can take part at all. ``runtimes`` are those of the workloads it may get; ``self_test`` may be
    ``None`` where it was not run."""
    found = [
        *_host_base(host, facts, self_test),
        *_host_criu(host, facts, self_test),
        *_host_tracker(host, facts),
        *_host_runtimes(host, facts, frozenset(runtimes)),
        *_host_network(host, interface, facts),
    ]
    found += [finding("LEFTOVER", host, f"{each.kind}: {each.detail}", each.hint or None) for each in facts.leftovers]
    found += [finding("UNFINISHED", host, f"migration {each} is unfinished") for each in facts.unfinished]
    return in_order(found)


def _host_base(host: str, facts: HostFacts, self_test: SelfTestResult | None) -> Iterator[Finding]:
    if numbers(facts.python) < _OLDEST_PYTHON:
        yield finding("PYTHON_TOO_OLD", host, f"python3 is {facts.python}; livemove's agent needs 3.11 or newer")
    if facts.euid != 0:
        yield finding("NOT_ROOT", host, f"the login has uid {facts.euid}, not 0")
    for capability in facts.missing_capabilities:
        if capability == "CAP_SYS_RESOURCE":
            if not _dumps_any_uid(self_test):
                message = "CAP_SYS_RESOURCE is missing: processes of another uid cannot be dumped"
                yield finding("SYS_RESOURCE_MISSING", host, message)
        else:
            yield finding("CAPABILITY_MISSING", host, f"{capability} is missing")


def _dumps_any_uid(self_test: SelfTestResult | None) -> bool:
    return self_test is not None and self_test.any_uid


def _host_criu(host: str, facts: HostFacts, self_test: SelfTestResult | None) -> Iterator[Finding]:
    criu = facts.criu
    if criu is None:
        yield finding("CRIU_MISSING", host, "no criu in the PATH")
        return
    proved = self_test is not None and self_test.ok
    if criu.problem:
        code = "CRIU_COMPLAINS" if proved else "CRIU_BROKEN"
        yield finding(code, host, f"{criu.path} {criu.version}: {criu.problem}")
    for feature in criu.missing:
        yield finding("CRIU_FEATURE_MISSING", host, f"{criu.path} {criu.version} on {facts.kernel} lacks {feature}")
    if _is_old_for_kernel(criu, facts.kernel) and not proved:
        yield finding("CRIU_OLD_FOR_KERNEL", host, f"CRIU {criu.version} on Linux {facts.kernel} cannot dump sockets")
    if self_test is not None and not self_test.ok:
        yield finding("SELF_TEST_FAILED", host, f"the self-test failed: {self_test.problem}")


def _host_tracker(host: str, facts: HostFacts) -> Iterator[Finding]:
    if facts.tracker == "none":
        yield finding("WRITES_NOT_TRACKED", host, f"Linux {facts.kernel}: {facts.tracker_problem}: stop-copy is used")


def _is_old_for_kernel(criu: CriuFacts, kernel: str) -> bool:
    version = numbers(criu.version)
    return (
        bool(version) and numbers(kernel) >= _FIRST_KERNEL_WITHOUT_PASSCRED and version < _FIRST_CRIU_WITHOUT_PASSCRED
    )


def _host_runtimes(host: str, facts: HostFacts, runtimes: frozenset[str]) -> Iterator[Finding]:
    for runtime in sorted(runtimes & _INSTALLED_RUNTIMES - facts.runtimes.keys()):
        yield finding("RUNTIME_MISSING", host, f"no {runtime} in the PATH", f"Install {runtime}.")
    if runtimes & _INSTALLED_RUNTIMES and facts.cgroup == "none":
        yield finding("CGROUP_MISSING", host, "no cgroup hierarchy is mounted")


def _host_network(host: str, interface: str, facts: HostFacts) -> Iterator[Finding]:
    if not facts.nf_tables:
        yield finding("NF_TABLES_MISSING", host, f"Linux {facts.kernel} offers no nf_tables")
    if facts.interface is None:
        there = ", ".join(facts.interfaces) or "none"
        yield finding("INTERFACE_MISSING", host, f"there is no interface {interface} (there are: {there})")
        return
    if not facts.interface.up:
        yield finding("INTERFACE_DOWN", host, f"{interface} is down", f"Bring it up: ip link set {interface} up.")
    if not is_unicast_mac(facts.interface.mac):
        yield finding(
            "INTERFACE_WITHOUT_MAC", host, f"{interface} has no Ethernet address ({facts.interface.mac or 'none'})"
        )
    if not facts.interface.addresses:
        yield finding("INTERFACE_WITHOUT_ADDRESS", host, f"{interface} has no address")


def move_findings(facts: MoveFacts) -> tuple[Finding, ...]:
    """Every reason why the move would fail, or lose something."""
    found = [*_unreachable(facts), *_placement(facts)]
    for host in dict.fromkeys((facts.source, facts.destination)):
        if host is not None and host in facts.hosts:
            found += _one_host(host, facts)
    source, destination = facts.source, facts.destination
    if source is None:
        return in_order(found)
    found += [
        from_obstacle(source, each)
        for each in facts.workloads[source].obstacles
        if each.code != NEEDS_CAP_SYS_RESOURCE or not _dumps_any_uid(facts.self_tests.get(source))
    ]
    found += _sockets(source, facts)
    if source == destination:
        found.append(finding("SAME_HOST", destination, f"{facts.workload.name} runs on {destination} already"))
        return in_order(found)
    if source in facts.hosts and destination in facts.hosts:
        found += _pair(facts, source, facts.hosts[source], facts.hosts[destination])
    if destination in facts.workloads:
        found += _destination(facts, facts.workloads[source], facts.workloads[destination])
    found += address_findings(facts, source)
    found += file_findings(facts, source)
    return in_order(found)


def _one_host(host: str, facts: MoveFacts) -> Iterator[Finding]:
    """The host's own findings; a leftover that would cut the service is an error here."""
    about = facts.hosts[host]
    services = {str(ip_interface(text).ip) for text in facts.workload.addresses}
    cutting = [each for each in about.leftovers if _may_cut(each, facts.workload.name, services)]
    for leftover in cutting:
        message = f"{leftover.kind}: {leftover.detail}: it would cut {facts.workload.name}"
        yield finding("LEFTOVER_CUTS_SERVICE", host, message, leftover.hint or None)
    others = replace(about, leftovers=tuple(each for each in about.leftovers if each not in cutting))
    self_test = facts.self_tests.get(host)
    yield from host_findings(host, facts.interfaces[host], others, self_test, {facts.workload.runtime})


def _may_cut(leftover: LeftoverFacts, workload: str, services: set[str]) -> bool:
    """Whether it names a service address; one that names no address at all may cut any.

    A gate is named by its migration, and a migration's id by its workload: those of others are not in the way.
    """
    if leftover.kind == "gate":
        return f"-{id_part(workload)}-" in leftover.detail
    words = re.split(r"[\s,;(){}\[\]/]+", leftover.detail)
    named = {address for word in words if (address := _address(word) or _address(word.rpartition(":")[0]))}
    return not named or bool(named & services)


def _unreachable(facts: MoveFacts) -> Iterator[Finding]:
    for host, error in facts.unreachable.items():
        if host in (facts.destination, facts.source):
            yield from_error(host, error)
        else:
            yield finding("HOST_NOT_ASKED", host, f"could not be asked for {facts.workload.name}: {error.message}")


def _placement(facts: MoveFacts) -> Iterator[Finding]:
    name = facts.workload.name
    running = running_on(facts.workloads)
    for host, each in facts.workloads.items():
        if each.moving:
            hint = f"Wait for it, or finish it with `livemove recover {each.moving}`."
            yield finding(
                "WORKLOAD_BUSY", host, f"{name} is part of migration {each.moving}, which is unfinished", hint
            )
        if each.runtime_problem:
            yield finding("RUNTIME_LOST_IT", host, each.runtime_problem)
    if len(running) > 1:
        yield finding("RUNS_ON_SEVERAL", name, f"{name} runs on {' and on '.join(running)}")
    if running:
        return
    stopped = [host for host, each in facts.workloads.items() if each.state == "stopped"]
    asked = ", ".join(facts.workloads) or "none"
    what = f"is there on {', '.join(stopped)}, and not running" if stopped else f"is on no host (asked: {asked})"
    missing = f"; could not be asked: {', '.join(facts.unreachable)}" if facts.unreachable else ""
    yield finding("WORKLOAD_NOT_RUNNING", name, f"{name} {what}{missing}")


def _pair(facts: MoveFacts, source: str, here: HostFacts, there: HostFacts) -> Iterator[Finding]:
    destination = facts.destination
    if here.identity == there.identity:
        yield finding(
            "SAME_HOST", destination, f"{source} and {destination} are two names of one host ({here.hostname})"
        )
    if here.machine != there.machine:
        message = f"{destination} is {there.machine}, {source} is {here.machine}"
        yield finding("ARCHITECTURE_DIFFERS", destination, message)
    if release(here.kernel) - release(there.kernel) >= _MUCH_OLDER_RELEASES:
        yield finding("KERNEL_MUCH_OLDER", destination, f"Linux {there.kernel} there, {here.kernel} on {source}")
    if here.criu and there.criu and numbers(here.criu.version) != numbers(there.criu.version):
        message = f"CRIU {there.criu.version} there, {here.criu.version} on {source}"
        yield finding("CRIU_VERSIONS_DIFFER", destination, message)
    if (
        facts.workload.runtime in CONTAINER_RUNTIMES
        and "none" not in (here.cgroup, there.cgroup)
        and here.cgroup != there.cgroup
    ):
        yield finding("CGROUP_DIFFERS", destination, f"cgroup {there.cgroup} there, {here.cgroup} on {source}")
    if here.interface and there.interface and here.interface.mtu != there.interface.mtu:
        message = (
            f"{there.interface.name} has {there.interface.mtu}, {source}'s {here.interface.name} {here.interface.mtu}"
        )
        yield finding("MTU_DIFFERS", destination, message)
    workload = facts.workloads[source]
    needed = image_space_bytes(workload.memory_bytes, len(workload.sockets))
    for host, about in ((source, here), (destination, there)):
        if about.memory_available_bytes < needed:
            message = f"the images need {needed // _MIB} MiB, {about.memory_available_bytes // _MIB} MiB are available"
            yield finding("NOT_ENOUGH_SPACE", host, message)


def _destination(facts: MoveFacts, here: WorkloadFacts, there: WorkloadFacts) -> Iterator[Finding]:
    workload, destination = facts.workload, facts.destination
    yield from runtime_findings(workload, destination, here, there)
    about = facts.hosts.get(destination)
    if here.namespace is not None and facts.source is not None:
        parent = namespace_parent(here.namespace, facts.interfaces[facts.source], facts.interfaces[destination])
        yield from namespace_findings(
            workload=workload,
            namespace=here.namespace,
            destination=destination,
            parent=parent,
            about=about,
            there=there,
            mover=facts.movers.get(destination),
        )
    if workload.runtime == "process" and about is not None:
        for pid in sorted(set(here.pids) & set(about.taken_pids)):
            yield finding("PID_TAKEN", destination, f"process id {pid} of {workload.name} is in use")


def _sockets(source: str, facts: MoveFacts) -> Iterator[Finding]:
    """Whether the sockets can be restored where only loopback and the service addresses exist."""
    sockets = facts.workloads[source].sockets
    services = {str(ip_interface(text).ip) for text in facts.workload.addresses}
    anywhere = {"0.0.0.0", "::"}
    inet = [(each, _address(each.local)) for each in sockets]
    if not any(local in services or local in anywhere for _, local in inet):
        yield finding(
            "NO_SERVICE_SOCKET", source, f"{facts.workload.name} has no socket on {', '.join(sorted(services))}"
        )
    own_ends = {(each.protocol, local, each.local_port) for each, local in inet}
    for each, local in dict.fromkeys(inet):  # sockets that share a port are one finding
        if local is None or local in services or local in anywhere:
            continue
        if not ip_address(local).is_loopback:
            yield finding(
                "SOCKET_ON_OTHER_ADDRESS", source, f"{_socket(each)} is bound to {local}, which stays on {source}"
            )
        elif each.remote_port and not own_ends & _remote_ends(each):
            yield finding("LOOPBACK_PEER_STAYS", source, f"{_socket(each)} leads to a process outside the workload")


def _remote_ends(socket: SocketFacts) -> set[tuple[str, str | None, int]]:
    """The sockets that may be a connection's other end: of its very address, or accepted by a wildcard listener."""
    return {(socket.protocol, address, socket.remote_port) for address in (_address(socket.remote), "0.0.0.0", "::")}


def _socket(socket: SocketFacts) -> str:
    remote = f" → {socket.remote}:{socket.remote_port}" if socket.remote_port else ""
    return f"{socket.protocol} {socket.local}:{socket.local_port}{remote}"


def _address(text: str) -> str | None:
    """An address normalised, an IPv4-mapped one as IPv4; ``None`` for what is no IP address (a unix socket's name)."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)


def is_unicast_mac(mac: str) -> bool:
    """Whether it is the Ethernet address of one interface: not zero, as loopback's is, and no group's."""
    if not re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", mac):
        return False
    octets = bytes.fromhex(mac.replace(":", ""))
    return any(octets) and not octets[0] & 1


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``6.18.0-rc2`` → ``(6, 18, 0)``; nothing for what has none."""
    match = re.search(r"[0-9]+(\.[0-9]+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def release(kernel: str) -> int:
    """A number that grows by one with every Linux release, to compare the ages of kernels roughly."""
    major, minor = (*numbers(kernel), 0, 0)[:2]
    return major * _RELEASES_PER_MAJOR + minor
