"""The machines of a running lab, and how to run something on them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labs import boot, groups
from labs.commands import LabError, failure, run
from labs.state import HostRecord, Paths, is_bound, start_time
from labs.topology import INTERFACE, SSH_PORT, Station

# Joins the group named by $0, then becomes the command.
JOIN_GROUP = 'echo 0 >"$0"/cgroup.procs && exec "$@"'
INSTALL = 'mkdir -p "$(dirname "$1")" && cat >"$1.new" && chmod "$2" "$1.new" && mv "$1.new" "$1"'

# A service that is to be moved may hold nothing from outside its host: no descriptor, no terminal, no session.
START_SERVICE = """\
import subprocess, sys
none = subprocess.DEVNULL
service = subprocess.Popen(sys.argv[1:], stdin=none, stdout=none, stderr=none, start_new_session=True)
print(service.pid)
"""


@dataclass(frozen=True)
class Machine:
    """A machine on the segment: by itself a network namespace over this machine's own files."""

    paths: Paths
    station: Station

    @property
    def name(self) -> str:
        return self.station.name

    @property
    def address(self) -> str:
        return self.station.address

    @property
    def address6(self) -> str:
        return self.station.address6

    @property
    def mac(self) -> str:
        return self.station.mac

    @property
    def interface(self) -> str:
        return INTERFACE

    @property
    def netns_path(self) -> Path:
        return self.paths.netns(self.name)

    @property
    def is_up(self) -> bool:
        return is_bound(self.netns_path)

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` on this machine, when run on the one we are on."""
        enter = ["nsenter", f"--net={self.netns_path}", "--", *argv]
        if self.name == "operator":
            return enter  # a shell there must survive the `labs/lab down` that is typed into it
        return ["sh", "-c", JOIN_GROUP, str(self.group), *enter]

    @property
    def group(self) -> Path:
        """The control group of what is started from outside."""
        return groups.of_machine(self.paths.name, self.name, is_host=self.station.is_host)

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        input: str | None = None,  # noqa: A002 - as subprocess.run calls it
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on this machine to its end and keep what it said; with `check`, a failure is a LabError."""
        done = run(self.command(argv), check=False, input=input, timeout=timeout)
        if check and done.returncode != 0:
            problem = failure(argv, done.returncode, done.stderr or done.stdout)
            raise LabError(f"on {self.name}: {problem}")
        return done

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program on this machine; options are those of subprocess.Popen. To end it is up to the caller;
        whatever still runs when the lab goes down is ended then, except on the operator machine.
        """
        return subprocess.Popen(self.command(argv), **options)


@dataclass(frozen=True)
class Host(Machine):
    """A machine with namespaces of every kind and a file system of its own."""

    record: HostRecord

    @property
    def init_pid(self) -> int:
        """The host's pid 1, as this machine counts."""
        return self.record.init_pid

    @property
    def is_up(self) -> bool:
        return super().is_up and self.record.is_alive and listens(self.init_pid, SSH_PORT)

    def command(self, argv: Sequence[str]) -> list[str]:
        namespaces = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup")
        environment = [f"{name}={value}" for name, value in boot.ENVIRONMENT.items()]
        enter = ["nsenter", f"--target={self.init_pid}", *namespaces, "--"]
        # The command is a child of nsenter, not nsenter itself: it is to end when nsenter is ended.
        mortal = ["setpriv", "--pdeathsig", "KILL", "env", "-i", *environment, "TERM=xterm"]
        return ["sh", "-c", JOIN_GROUP, str(self.group), *enter, *mortal, *argv]

    def start_service(self, argv: Sequence[str], pid_file: str | None = None) -> int:
        """Start a program that stays, detached so that CRIU can dump it; returns its pid on the host."""
        pid = int(self.run(["python3", "-I", "-S", "-c", START_SERVICE, *argv]).stdout)
        if pid_file is not None:
            self.write_file(pid_file, f"{pid}\n")
        return pid

    def ssh_command(self, argv: Sequence[str] = ()) -> list[str]:
        """The command that reaches this host from the operator machine with the system's own ssh."""
        options = {
            "IdentitiesOnly": "yes",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": str(self.paths.known_hosts),
            "GlobalKnownHostsFile": "/dev/null",
        }
        ssh = ["ssh", "-F", "none", "-i", str(self.paths.operator_key)]
        for name, value in options.items():
            ssh += ["-o", f"{name}={value}"]
        return [*ssh, f"root@{self.address}", *([shlex.join(argv)] if argv else [])]

    def write_file(self, path: str, content: str, mode: int = 0o644) -> None:
        """Put a file on the host, whole or not at all; directories on the way are made."""
        self.run(["sh", "-ec", INSTALL, "install", path, f"{mode:o}"], input=content)

    def read_file(self, path: str) -> str:
        return self.run(["cat", path]).stdout

    def seen_from_here(self, path: str) -> Path:
        """A file of the host, to be looked at again and again: a program run there takes 30 ms of a processor."""
        return Path(f"/proc/{self.init_pid}/root{path}")


def start_host(paths: Paths, station: Station, root: Path) -> HostRecord:
    """Start a host over the cached root. Undo: end its control group, which ends its pid namespace."""
    assert station.first_pid is not None
    group = groups.of_machine(paths.name, station.name, is_host=True)
    paths.scratch(station.name).mkdir(parents=True)
    spec = boot.HostSpec(
        name=station.name,
        root=str(root),
        scratch=str(paths.scratch(station.name)),
        seed=str(paths.seed(station.name)),
        shared=str(paths.shared),
        netns=str(paths.netns(station.name)),
        group=str(group.parent),
        first_pid=station.first_pid,
    )
    started = run([sys.executable, "-I", "-S", boot.__file__, spec.to_json()])
    pid = int(started.stdout)
    since = start_time(pid)
    if since is None:
        raise LabError(f"host {station.name}: its init ended at once; is {root} whole? Remove it to build it anew")
    return HostRecord(pid, since)


def listens(pid: int, port: int) -> bool:
    """Whether something listens on the TCP port in the network namespace of a process."""
    try:
        lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    except OSError:
        return False
    sockets = (line.split() for line in lines)
    return any(fields[1].endswith(f":{port:04X}") and fields[3] == "0A" for fields in sockets)
