"""TOML → frozen ``Configuration``. Every error names the file, the key, what is wrong with it and what to write.

All problems of a file are collected and shown together. Nothing is contacted; the only thing looked at besides the
file itself is whether the key files it names exist. docs/configuration.md describes every key; a test compares.
"""

from __future__ import annotations

import os
import posixpath
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from coordinator.config_section import Problems, Section, address_of, cidr, did_you_mean, ssh_target
from coordinator.errors import ConfigError, UnknownHost, UnknownWorkload
from coordinator.facts import (
    CONTAINER_RUNTIMES,
    OCI_RUNTIMES,
    FilesKind,
    MoverSpec,
    RouterSpec,
    VolumeSpec,
    WorkloadSpec,
)
from coordinator.protocol import Deadlines, GiveUpMode, MemoryPolicy, Mode
from coordinator.wire import encode

DEFAULT_PATH = Path("livemove.toml")
ENVIRONMENT_VARIABLE = "LIVEMOVE_CONFIG"

HOST_KEYS = ("ssh", "key", "known_hosts", "interface", "channel_address")
RUNTIME_KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(OCI_RUNTIMES, ("container", "bundle")),
    "podman": ("container",),
    "process": ("pid_file", "root_pid"),
}
MOVER_KEYS: dict[str, tuple[str, ...]] = {
    "l2": (),
    "route": ("router", "router_key", "router_known_hosts"),
    "hook": ("hook",),
}
WORKLOAD_KEYS = (
    "runtime",
    "addresses",
    *dict.fromkeys(key for keys in RUNTIME_KEYS.values() for key in keys),
    "mover",
    *(key for keys in MOVER_KEYS.values() for key in keys),
    "files",
    "volumes",
)
VOLUME_KEYS = ("path", "files")
FILES_KINDS = get_args(FilesKind)
MODES = ("auto", *get_args(Mode))
GIVE_UPS = get_args(GiveUpMode)
POLICY_KEYS = (*Deadlines.__dataclass_fields__, *MemoryPolicy.__dataclass_fields__)
SECTIONS: dict[str, tuple[str, ...]] = {"hosts": HOST_KEYS, "workloads": WORKLOAD_KEYS, "policy": POLICY_KEYS}

#: Names go into migration ids, and with them into directory and nft table names.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_CONTAINER = re.compile(r"[A-Za-z0-9_+.-]{1,128}")
_INTERFACE = re.compile(r"[^\s/:]{1,15}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A host and how it is reached. ``channel_address`` is where the other host's agent reaches this one."""

    name: str
    address: str
    port: int = 22
    user: str = "root"
    key: Path
    known_hosts: Path
    interface: str
    channel_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The operator's bounds on a migration. ``auto`` is pre-copy where the source's kernel can track writes."""

    deadlines: Deadlines = field(default_factory=Deadlines)
    mode: Literal["auto"] | Mode = "auto"
    memory: MemoryPolicy = field(default_factory=MemoryPolicy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """A configuration file, checked."""

    path: Path
    hosts: Mapping[str, Host]
    workloads: Mapping[str, WorkloadSpec]
    policy: Policy = field(default_factory=Policy)

    def host(self, name: str) -> Host:
        """The host of that name; ``UnknownHost`` with the nearest names if there is none."""
        if name not in self.hosts:
            raise UnknownHost(f"{self.path}: no host {name!r}{_known(name, self.hosts)}")
        return self.hosts[name]

    def workload(self, name: str) -> WorkloadSpec:
        """The workload of that name; ``UnknownWorkload`` with the nearest names if there is none."""
        if name not in self.workloads:
            raise UnknownWorkload(f"{self.path}: no workload {name!r}{_known(name, self.workloads)}")
        return self.workloads[name]

    def with_memory(self, *, mode: str | None, max_freeze_ms: float | None, give_up: str | None) -> Configuration:
        """The same with what a command line says of memory in place of the policy; ``None`` leaves it as it is."""
        given = {"max_freeze_ms": max_freeze_ms, "give_up": give_up}
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        policy = replace(self.policy, memory=replace(self.policy.memory, **changes))
        return replace(self, policy=policy if mode is None else replace(policy, mode=cast(Any, mode)))


def configuration_path(option: str | None, environment: Mapping[str, str]) -> Path:
    """Which file to read: ``--config``, else ``LIVEMOVE_CONFIG``, else ``./livemove.toml``."""
    return Path(option or environment.get(ENVIRONMENT_VARIABLE) or DEFAULT_PATH)


def load(path: Path) -> Configuration:
    """Read and check a file. Raises ``ConfigError``, and nothing else, whatever is in the file."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: no such file",
            f"Write one (docs/configuration.md), or name it with --config FILE or {ENVIRONMENT_VARIABLE}.",
        ) from error
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError, and so is a NUL in the name
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return parse(text, path)


def parse(text: str, path: Path) -> Configuration:
    """Check the text of a configuration; ``path`` names it in errors and is what relative files are relative to."""
    table = _toml(text, path)
    problems = Problems()
    root = Section(problems, "", table, tuple(SECTIONS))
    folder = path.absolute().parent
    hosts = {
        name: host
        for name, section in _named_sections(root, "hosts", HOST_KEYS).items()
        if (host := _host(name, section, folder)) is not None
    }
    workloads = {
        name: workload
        for name, section in _named_sections(root, "workloads", WORKLOAD_KEYS).items()
        if (workload := _workload(name, section)) is not None
    }
    policy = _policy(root.section("policy", POLICY_KEYS))
    if "hosts" not in table:
        problems.add("hosts", "missing; write a [hosts.NAME] section for every host")
    _check_addresses(problems, hosts, workloads)
    problems.raise_for(path)
    return Configuration(path=path, hosts=hosts, workloads=workloads, policy=policy)


def _toml(text: str, path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError is one; so is an integer of too many digits
        line = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        where = f"{path}:{line[1]}:{line[2]}" if line else f"{path}"
        what = re.sub(r" \(at line .*\)$", "", str(error))
        raise ConfigError(f"{where}: not TOML: {what}", "Mend the syntax at that place.") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply", "A configuration has two levels of tables.") from error


def _known(name: str, known: Mapping[str, object]) -> str:
    return f" (there are: {', '.join(known) or 'none'}){did_you_mean(name, tuple(known))}"


def _named_sections(root: Section, key: str, known: tuple[str, ...]) -> dict[str, Section]:
    """The ``[key.NAME]`` sections, with a problem for every NAME that is no name."""
    parent = root.section(key, None)
    found: dict[str, Section] = {}
    for name in parent.table:
        if not _NAME.fullmatch(name):
            parent.problem(
                name, "not a name; write letters, digits, '_', '.' and '-', at most 63, a letter or digit first"
            )
        elif isinstance(parent.table[name], dict):
            found[name] = parent.section(name, known)
        else:
            parent.problem(name, f"must be a section; write [{key}.{name}] above its keys{did_you_mean(name, known)}")
    return found


def _host(name: str, section: Section, folder: Path) -> Host | None:
    target_text = section.text("ssh", 'ssh = "root@192.0.2.11"')
    target = section.parsed("ssh", target_text, ssh_target)
    key = _file(section, "key", folder, "the private key that the host's root accepts")
    known_hosts = _file(section, "known_hosts", folder, "a known_hosts file with the host's verified key")
    interface = section.text("interface", 'interface = "eth0"', pattern=_INTERFACE)
    channel_text = section.text("channel_address", 'channel_address = "192.0.2.11"', required=False)
    channel_address = section.parsed("channel_address", channel_text, address_of)
    if target is None or key is None or known_hosts is None or interface is None:
        return None
    return Host(
        name=name,
        address=target.address,
        port=target.port,
        user=target.user,
        key=key,
        known_hosts=known_hosts,
        interface=interface,
        channel_address=channel_address or target.address,
    )


def _file(section: Section, key: str, folder: Path, what: str) -> Path | None:
    text = section.text(key, f'{key} = "keys/{"operator" if key == "key" else key}"')
    if text is None:
        return None
    try:
        path = folder / Path(text).expanduser()
        present = os.path.isfile(path)  # noqa: PTH113 - False, not an error, for a name that can be no file
    except (RuntimeError, ValueError):  # a home folder of nobody; a NUL in the name
        path, present = Path(text), False
    if not present:
        section.problem(key, f"no such file: {path}; name {what}")
        return None
    return path


def _workload(name: str, section: Section) -> WorkloadSpec | None:
    runtime = section.text("runtime", 'runtime = "runc"')
    addresses = _service_addresses(section)
    mover = _mover(section)
    files, volumes = _files(section)
    if runtime is None:
        return None
    if runtime not in RUNTIME_KEYS:
        known = " or ".join(f'"{each}"' for each in RUNTIME_KEYS)
        section.problem(
            "runtime", f"{runtime!r} is no runtime{did_you_mean(runtime, tuple(RUNTIME_KEYS))}; write {known}"
        )
        return None
    _keys_of_others(section, "runtime", runtime, RUNTIME_KEYS)
    if runtime in CONTAINER_RUNTIMES:
        return WorkloadSpec(
            name=name,
            runtime=cast(Any, runtime),
            addresses=addresses,
            container=section.text("container", 'container = "counter"', pattern=_CONTAINER),
            bundle=section.absolute("bundle", 'bundle = "/srv/counter"') if runtime in OCI_RUNTIMES else None,
            mover=mover,
            files=files,
            volumes=volumes,
        )
    if files != "unchecked":
        what = f"of a process nobody knows the directories; name each in [[workloads.{name}.volumes]]"
        section.problem("files", f'not allowed with runtime = "process": {what}')
    pid_file, root_pid = _process(section)
    return WorkloadSpec(
        name=name,
        runtime="process",
        addresses=addresses,
        pid_file=pid_file,
        root_pid=root_pid,
        mover=mover,
        volumes=volumes,
    )


def _files(section: Section) -> tuple[FilesKind, tuple[VolumeSpec, ...]]:
    files = section.choice("files", FILES_KINDS, "unchecked")
    volumes: dict[str, VolumeSpec] = {}
    for number, entry in enumerate(section.sections("volumes", VOLUME_KEYS)):
        path = entry.absolute("path", 'path = "/srv/counter/data"')
        entry.text("files", 'files = "sync"')
        kind = entry.choice("files", FILES_KINDS, "unchecked")
        if path is None:
            continue
        path = posixpath.normpath(path)
        if other := next((known for known in volumes if _overlap(known, path)), None):
            section.problem(f"volumes[{number}]", f"{path} and {other} are one in the other; remove one of them")
        volumes[path] = VolumeSpec(path=path, files=cast(Any, kind))
    return cast(Any, files), tuple(volumes.values())


def _overlap(one: str, other: str) -> bool:
    return posixpath.commonpath((one, other)) in (one, other)


def _keys_of_others(section: Section, key: str, chosen: str, known: Mapping[str, tuple[str, ...]]) -> None:
    """A problem for every key that belongs to another choice than the one made."""
    for other, keys in known.items():
        for each in set(keys) - set(known[chosen]):
            if each in section.table:
                section.problem(each, f'not allowed with {key} = "{chosen}"; remove it, or write {key} = "{other}"')


def _mover(section: Section) -> MoverSpec:
    kind = section.choice("mover", tuple(MOVER_KEYS), "l2")
    _keys_of_others(section, "mover", kind, MOVER_KEYS)
    if kind == "hook":
        hook = section.absolute("hook", 'hook = "/usr/local/sbin/move-address"')
        return MoverSpec(kind="hook", hook=hook or "")
    if kind == "route":
        target = section.parsed("router", section.text("router", 'router = "root@192.0.2.1"'), ssh_target)
        key = section.absolute("router_key", 'router_key = "/etc/livemove/router"', required=False)
        known = section.absolute("router_known_hosts", 'router_known_hosts = "/etc/livemove/known"', required=False)
        if target is not None:
            router = RouterSpec(
                address=target.address, user=target.user, port=target.port, key=key or "", known_hosts=known or ""
            )
            return MoverSpec(kind="route", router=router)
    return MoverSpec()


def _process(section: Section) -> tuple[str | None, int | None]:
    given = [key for key in RUNTIME_KEYS["process"] if key in section.table]
    if not given:
        section.problem("pid_file", 'missing; write pid_file = "/run/NAME.pid", or root_pid = 1234')
    elif len(given) == 2:
        section.problem("root_pid", "not allowed together with pid_file; remove one of the two")
    pid_file = section.absolute("pid_file", 'pid_file = "/run/counter.pid"', required=False)
    root_pid = section.whole("root_pid", "root_pid = 1234", least=2, most=4_194_304)
    return pid_file, root_pid


def _service_addresses(section: Section) -> tuple[str, ...]:
    texts = section.texts("addresses", 'addresses = ["192.0.2.200/24"]')
    parsed = [section.parsed(f"addresses[{number}]", text, cidr) for number, text in enumerate(texts)]
    return tuple(str(interface) for interface in parsed if interface is not None)


def _policy(section: Section) -> Policy:
    times = {key: section.seconds(key, f"{key} = {usual}") for key, usual in encode(Deadlines()).items()}
    usual = MemoryPolicy()
    max_freeze_ms = section.number("max_freeze_ms", f"max_freeze_ms = {usual.max_freeze_ms}", unit=" of milliseconds")
    max_factor = section.number("max_factor", f"max_factor = {usual.max_factor}")
    max_rounds = section.whole("max_rounds", f"max_rounds = {usual.max_rounds}", least=1, most=100)
    return Policy(
        deadlines=Deadlines(**{key: value for key, value in times.items() if value is not None}),
        mode=cast(Any, section.choice("mode", MODES, "auto")),
        memory=MemoryPolicy(
            max_freeze_ms=max_freeze_ms or usual.max_freeze_ms,
            max_rounds=max_rounds or usual.max_rounds,
            max_factor=max_factor or usual.max_factor,
            give_up=cast(Any, section.choice("give_up", GIVE_UPS, usual.give_up)),
        ),
    )


def _check_addresses(problems: Problems, hosts: dict[str, Host], workloads: dict[str, WorkloadSpec]) -> None:
    """A service address belongs to one workload alone, and never to a host: it moves, and SSH would move with it."""
    owners = {host.channel_address: f"the channel address of hosts.{host.name}" for host in hosts.values()}
    owners |= {host.address: f"the ssh address of hosts.{host.name}" for host in hosts.values()}
    for workload in workloads.values():
        for number, text in enumerate(workload.addresses):
            address = text.partition("/")[0]
            where = f"workloads.{workload.name}.addresses[{number}]"
            if address in owners:
                problems.add(
                    where, f"{address} is {owners[address]} already; write an address that is this workload's alone"
                )
            owners.setdefault(address, f"in {where}")
