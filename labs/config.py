"""lab.toml: the description of the lab that livemove itself reads."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from labs.commands import LabError
from labs.state import Paths
from labs.topology import HOSTS, INTERFACE

Value = str | list[str]


@dataclass(frozen=True)
class Workload:
    """A service that can be moved, as the configuration names it."""

    name: str
    runtime: Literal["runc", "crun", "podman", "process"]
    addresses: tuple[str, ...]  # with prefix length
    container: str | None = None  # not a plain process
    bundle: str | None = None  # runc, crun
    pid_file: str | None = None  # process
    mover: str | None = None  # None: l2
    router: str | None = None
    router_key: str | None = None
    router_known_hosts: str | None = None
    hook: str | None = None
    files: str | None = None
    network: Literal["host", "veth", "macvlan"] = "host"  # a container: a network namespace of its own, attached so

    @property
    def netns(self) -> str:
        """The name of its own network namespace."""
        return self.name if self.network != "host" else ""

    def section(self) -> str:
        fields: dict[str, Value | None] = {
            "runtime": self.runtime,
            "container": self.container,
            "bundle": self.bundle,
            "pid_file": self.pid_file,
            "addresses": list(self.addresses),
            "mover": self.mover,
            "router": self.router,
            "router_key": self.router_key,
            "router_known_hosts": self.router_known_hosts,
            "hook": self.hook,
            "files": self.files,
        }
        return _section(f"workloads.{self.name}", fields)


WORKLOADS = (
    Workload("counter", "runc", ("192.0.2.200/24",), container="counter", bundle="/srv/counter"),
    Workload("echo", "process", ("192.0.2.201/24",), pid_file="/run/echo.pid"),
)


def write(paths: Paths) -> None:
    """Write the configuration of a lab with its hosts and the workloads every lab knows."""
    sections = [
        _section(
            f"hosts.{host.name}",
            {
                "ssh": f"root@{host.address}",
                "key": str(paths.operator_key),
                "known_hosts": str(paths.known_hosts),
                "interface": INTERFACE,
            },
        )
        for host in HOSTS
    ]
    sections += [workload.section() for workload in WORKLOADS]
    paths.config.write_text("\n".join(sections))


def add_workload(path: Path, workload: Workload) -> None:
    """Register a further workload in a lab's configuration; one that says the same already is left alone."""
    text = path.read_text()
    section = workload.section()
    known = tomllib.loads(text).get("workloads", {})
    if workload.name not in known:
        path.write_text(f"{text.rstrip()}\n\n{section}")
    elif known[workload.name] != tomllib.loads(section)["workloads"][workload.name]:
        raise LabError(f"{path}: workload {workload.name!r} is there already and says something else; rename one")


def remove_workload(path: Path, name: str) -> None:
    """Take a workload out of a lab's configuration, if it is there."""
    sections = path.read_text().split("\n\n")
    path.write_text("\n\n".join(each for each in sections if f"[workloads.{name}]" not in each.splitlines()[:1]))


def _section(title: str, fields: dict[str, Value | None]) -> str:
    # A JSON string or list of strings is one of TOML, too.
    lines = [f"{key} = {json.dumps(value)}" for key, value in fields.items() if value is not None]
    return "\n".join([f"[{title}]", *lines]) + "\n"
