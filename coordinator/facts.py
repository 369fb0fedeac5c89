"""What an agent can tell of its host and of a workload on it: the facts that checks and plans are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

RuntimeName = Literal["runc", "crun", "podman", "process"]
#: Those with runc's command line, whose containers are known by an id and a bundle.
OCI_RUNTIMES: tuple[Literal["runc", "crun"], ...] = ("runc", "crun")
#: Those that have to be installed.
CONTAINER_RUNTIMES: tuple[RuntimeName, ...] = (*OCI_RUNTIMES, "podman")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """A router, and how a host logs in there. ``key`` and ``known_hosts`` are files on the hosts; empty: ssh's own."""

    address: str
    user: str = "root"
    port: int = 22
    key: str = ""
    known_hosts: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoverSpec:
    """The way the addresses get to another host (``netfix.movers``). ``hook`` is a path on the hosts."""

    kind: Literal["l2", "route", "hook"] = "l2"
    router: RouterSpec | None = None
    hook: str = ""


#: How a directory of a workload gets to another host: nobody looks; it is the same storage there; the same content is
#: there; or it is copied.
FilesKind = Literal["unchecked", "shared", "present", "sync"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeSpec:
    """A directory of the host that goes another way than the rest of its workload's files."""

    path: str
    files: FilesKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A directory of the host, ``path``, that the workload sees at ``inside``; ``root``: as its root file system."""

    path: str
    inside: str
    files: FilesKind
    root: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeFacts:
    """A tree as one host sees it. ``left_over``: an earlier move of this workload has left it here. ``problem``: why it
    cannot be used. ``probe_seen``: the file that the other host has put into it is here. ``digest``: of names, content,
    owners, modes and extended attributes (``present``). ``used_bytes`` and ``entries`` are what it takes here
    (``sync``); ``free_bytes`` and ``free_entries`` what could be added; its parent's, if it is absent."""

    path: str
    state: Literal["absent", "empty", "filled"]
    problem: str = ""
    left_over: bool = False
    probe_seen: bool = False
    digest: str = ""
    used_bytes: int = 0
    entries: int = 0
    free_bytes: int = 0
    free_entries: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesFacts:
    """A workload's trees on one host, in the order they were asked for. ``rsync`` is its version, empty if there is
    none."""

    rsync: str
    trees: tuple[TreeFacts, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """What is to be moved, as the configuration has it. ``addresses`` are the service addresses in CIDR form. ``files``
    is how its directories get to another host, but for those in ``volumes``."""

    name: str
    runtime: RuntimeName
    addresses: tuple[str, ...]
    container: str | None = None
    bundle: str | None = None
    pid_file: str | None = None
    root_pid: int | None = None
    mover: MoverSpec = field(default_factory=MoverSpec)
    files: FilesKind = "unchecked"
    volumes: tuple[VolumeSpec, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CriuFacts:
    """The CRIU of a host. ``missing`` names features that livemove uses and ``criu check --feature`` denies;
    ``problem`` is the first explaining line of a ``criu check`` that failed."""

    path: str
    version: str
    missing: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceFacts:
    """The configured interface of a host; ``addresses`` in CIDR form."""

    name: str
    mac: str
    up: bool
    mtu: int
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftoverFacts:
    """A rule or table on a host that would cut the service: left by CRIU or by an earlier migration."""

    kind: str
    detail: str
    hint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What preflight wants to know of a host. ``identity`` differs between any two running hosts, also when they share
    a kernel (boot id, pid and network namespace). ``taken_pids`` are all process and thread ids in use; ``tracker`` is
    how this kernel can tell which pages were written, ``tracker_problem`` why it cannot;
    ``tracks_connections``: the kernel's connection table has entries, as on a host with a stateful firewall or NAT."""

    hostname: str
    identity: str
    kernel: str
    machine: str
    python: str
    euid: int
    missing_capabilities: tuple[str, ...]
    criu: CriuFacts | None
    runtimes: dict[str, str]
    cgroup: Literal["v1", "v2", "hybrid", "none"]
    nf_tables: bool
    interface: InterfaceFacts | None
    interfaces: tuple[str, ...]
    memory_available_bytes: int
    leftovers: tuple[LeftoverFacts, ...]
    unfinished: tuple[str, ...]
    agent_rss_bytes: int
    taken_pids: tuple[int, ...] = ()
    tracker: Literal["write_protect", "soft_dirty", "none"] = "none"
    tracker_problem: str = ""
    tracks_connections: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketFacts:
    """One socket of a workload, as ``netfix.sockets`` reads it."""

    family: str
    protocol: str
    state: str
    local: str
    local_port: int
    remote: str
    remote_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteFacts:
    """A route in a workload's network namespace; see ``netfix.attachment.Route``."""

    destination: str
    gateway: str
    source: str
    priority: int
    scope: int
    protocol: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceFacts:
    """A workload's own network namespace at ``path``, and how it is attached; see ``netfix.attachment.Attachment``."""

    path: str
    interface: str
    kind: str
    parent: str
    host_end: str
    mode: str
    mac: str
    mtu: int
    addresses: tuple[str, ...]
    routes: tuple[RouteFacts, ...]
    sysctls: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoverFacts:
    """A host's end of a mover: ``problem`` says why it cannot work there, if so. ``routes``: the next hop that a router
    has for each address (without prefix length), empty for none, in its own words for one that is no plain host route.
    ``onward``: the interface to which the host passes on what the router sends it for an address; empty if to none.
    """

    problem: str = ""
    routes: dict[str, str] = field(default_factory=dict)
    onward: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicePort:
    """Where clients reach a workload: ``protocol`` is tcp or udp, ``address`` has no prefix length."""

    protocol: Literal["tcp", "udp"]
    address: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FirewallDrop:
    """A service port that a host's firewall drops for every client, and the chain that does, as nft names it."""

    service: ServicePort
    chain: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """Something of a workload that CRIU would refuse or lose; ``code`` is the stable code of the finding."""

    code: str
    message: str
    hint: str
    fatal: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadFacts:
    """A workload as one host sees it.

    ``state`` is the runtime's word. ``memory_bytes`` counts resident memory, shared pages once. ``pids`` includes the
    thread ids of a plain process tree, because a restore needs them free. ``bundle_digest``: of how the
    container is defined, by its config.json or by what podman says of it. ``addresses`` maps each service address that
    this host has to the interfaces it is on. ``moving`` is the id of a migration of it that is unfinished here.
    ``runtime_problem``: why the runtime's word is not to be trusted. ``namespace``: its own network namespace, where it
    has one; ``namespace_taken``: the path at which it would be, and where something is, on a host that does not run
    it. ``trees``: its directories that somebody has to look at, as it is defined on this host."""

    state: Literal["running", "stopped", "absent"]
    root_pid: int = 0
    pids: tuple[int, ...] = ()
    memory_bytes: int = 0
    sockets: tuple[SocketFacts, ...] = ()
    addresses: dict[str, tuple[str, ...]] = field(default_factory=dict)
    bundle_present: bool = True
    bundle_problem: str = ""
    runtime_problem: str = ""
    bundle_digest: str = ""
    executable: str = ""
    obstacles: tuple[Obstacle, ...] = ()
    moving: str = ""
    namespace: NamespaceFacts | None = None
    namespace_taken: str = ""
    trees: tuple[Tree, ...] = ()
