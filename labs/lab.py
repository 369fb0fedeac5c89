"""The story of a lab: how it goes up, what is in it, and how it goes down again."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from labs import access, config, groups, root, segment
from labs.commands import LabError
from labs.machines import Host, Machine, start_host
from labs.state import Paths, Record, all_labs_locked
from labs.topology import HOSTS, STATIONS

SSH_START_S = 20.0


@dataclass(frozen=True)
class Lab:
    """A lab that is up."""

    paths: Paths
    machines: dict[str, Machine]
    packages: str

    @classmethod
    def up(cls, name: str = "lab", progress: Callable[[str], None] = lambda _: None, *, packages: str = "base") -> Lab:
        """The lab of that name, built if it is not up. What is there of a broken one is taken down first.

        ``packages``: one of ``root.EXTRAS``. A lab that is up with others than these and `base` is a LabError.
        """
        paths = Paths(name)
        with all_labs_locked(), ExitStack() as undo:
            running = find(paths)
            if running is not None:
                return running.with_packages(packages)
            if exists(paths):
                progress("Taking down what is left of the lab")
            _remove(paths)
            progress(f"Debian root {packages}" + ("" if root.is_cached(packages) else ", built once (20 s or more)"))
            lower = root.ensure(packages)
            undo.callback(_remove, paths)
            progress("Network segment and keys")
            paths.directory.mkdir(mode=0o700)
            paths.shared.mkdir()
            for station in STATIONS:
                groups.make(name, station.name, is_host=station.is_host)
            with ThreadPoolExecutor() as both:
                list(both.map(lambda make: make(paths), (segment.make, access.make)))
            progress("Hosts")
            with ThreadPoolExecutor() as together:
                started = together.map(lambda host: start_host(paths, host, lower), HOSTS)
                record = Record(str(lower), packages, dict(zip((host.name for host in HOSTS), started, strict=True)))
            shutil.rmtree(paths.directory / "seed")
            config.write(paths)
            record.save(paths.record)
            lab = _described(paths, record)
            lab._wait_for_ssh()
            undo.pop_all()
        return lab

    @classmethod
    def attach(cls, name: str = "lab") -> Lab:
        """The lab of that name, which must be up."""
        lab = find(Paths(name))
        if lab is None:
            raise LabError(f"lab {name!r} is not up, or only in parts; run: labs/lab --name {name} up")
        return lab

    def down(self) -> None:
        """Take the lab down; nothing of it is left."""
        down(self.paths)

    @property
    def name(self) -> str:
        return self.paths.name

    @property
    def config_path(self) -> Path:
        """The configuration that livemove reads."""
        return self.paths.config

    def with_packages(self, packages: str) -> Lab:
        """This lab, if its hosts have that set of packages."""
        if packages not in ("base", self.packages):
            raise LabError(
                f"lab {self.name!r} is up with the packages {self.packages!r}, without {packages!r};"
                f" run: labs/lab --name {self.name} down"
            )
        return self

    def machine(self, name: str) -> Machine:
        """Any machine of the lab."""
        if name not in self.machines:
            raise LabError(f"no machine {name!r} in the lab; there are: {', '.join(self.machines)}")
        return self.machines[name]

    def host(self, name: str) -> Host:
        """A machine that is a host."""
        machine = self.machine(name)
        if not isinstance(machine, Host):
            hosts = ", ".join(host.name for host in HOSTS)
            raise LabError(f"{name} is not a host, only a network namespace; hosts are: {hosts}")
        return machine

    def add_workload(self, workload: config.Workload) -> None:
        """Make a further workload known to livemove."""
        config.add_workload(self.config_path, workload)

    def forget_workload(self, name: str) -> None:
        """Make a workload, which runs nowhere, unknown to livemove, if it is known."""
        config.remove_workload(self.config_path, name)

    @contextmanager
    def bridges(self) -> Iterator[None]:
        """Every host has a bridge on the segment, for containers with a network of their own."""
        with ExitStack() as undo:
            for station in HOSTS:
                segment.add_bridge(self.paths, station)
                undo.callback(segment.remove_bridge, self.paths, station)
            yield

    def capture(self, path: Path, expression: str = "") -> AbstractContextManager[segment.Capture]:
        """Record the packets on the segment that match a tcpdump expression, for the length of a `with` block."""
        return segment.capture(self.paths, path, expression)

    def _wait_for_ssh(self) -> None:
        deadline = time.monotonic() + SSH_START_S
        while slow := [machine.name for machine in self.machines.values() if not machine.is_up]:
            if time.monotonic() > deadline:
                raise LabError(f"sshd does not answer on {', '.join(slow)} after {SSH_START_S:g} s")
            time.sleep(0.01)


def find(paths: Paths) -> Lab | None:
    """The lab if it is up, whole and healthy."""
    record = Record.load(paths.record)
    if record is None or record.hosts.keys() != {host.name for host in HOSTS} or not segment.is_made(paths):
        return None
    lab = _described(paths, record)
    return lab if all(machine.is_up for machine in lab.machines.values()) else None


def exists(paths: Paths) -> bool:
    """Whether anything of the lab is there, whole or not."""
    return paths.directory.exists() or groups.of_lab(paths.name).exists()


def down(paths: Paths) -> bool:
    """Take down whatever there is of a lab; says whether there was anything."""
    with all_labs_locked():
        anything = exists(paths)
        _remove(paths)
    return anything


def _described(paths: Paths, record: Record) -> Lab:
    machines: dict[str, Machine] = {}
    for station in STATIONS:
        known = record.hosts.get(station.name)
        machines[station.name] = Machine(paths, station) if known is None else Host(paths, station, known)
    return Lab(paths, machines, record.packages)


def _remove(paths: Paths) -> None:
    """Processes first, and with them their namespaces and mounts; then the network; then the files."""
    groups.destroy(groups.of_lab(paths.name))
    segment.destroy(paths)
    if paths.directory.exists():
        shutil.rmtree(paths.directory)
