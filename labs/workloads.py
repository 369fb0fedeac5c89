"""The lab's workloads on the lab's hosts: put their files there, start them, take them away again.

What a workload is called, where it listens and what runs it is read from the lab's own `lab.toml`, the file that
`livemove` reads. This module knows how such a service is set up; it knows nothing of how it is moved.
"""

from __future__ import annotations

import ipaddress
import json
import re
import shlex
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, TypeVar

from labs import config, oci, podman
from labs.commands import LabError
from labs.lab import Lab
from labs.machines import Host
from labs.programs.memory_regions import NOTES
from labs.segment import BRIDGE
from labs.topology import HOSTS, INTERFACE, STATIONS

T = TypeVar("T")

PORT = 7000
CODE = "/srv/pattern"
"""Where the service's files are on every host, and, through the container's root, in the container."""

DATA_SIZE = "512m"
BOOKKEEPER = "labs.programs.bookkeeper"
LEFT_OVER = "/var/lib/livemove/left-over"
"""What livemove remembers on a host of files that are old there."""

LISTEN_TIMEOUT_S = 60.0
END_TIMEOUT_S = 10.0
SERVICE_FILES = (
    "__init__.py",
    "ballast.py",
    "bookkeeper.py",
    "datagram_server.py",
    "household.py",
    "memfd_server.py",
    "memory_regions.py",
    "memory_server.py",
    "pattern.py",
    "pattern_server.py",
    "puppet.py",
    "segment_server.py",
    "shared_server.py",
    "tmpfs_files.py",
    "tmpfs_server.py",
)

#: Puts files into a directory, each whole or not at all; in one go, because every program run on a host takes 30 ms.
INSTALL_FILES = """\
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
for name, text in json.load(sys.stdin).items():
    new = folder / f"{name}.new"
    new.write_text(text)
    new.chmod(0o644)
    new.rename(folder / name)
"""


@dataclass(frozen=True)
class Workload(config.Workload):
    """A workload of the configuration, and what its service carries along, for tests and benchmarks."""

    memory_mb: int = 0
    dirty_mb_s: float = 0.0
    program: str = "pattern_server"
    port: int = PORT
    #: As a plain process: what starts it in the background and writes its pid file, if `program` does not do that.
    launch: tuple[str, ...] = ()

    @classmethod
    def of_lab(cls, lab: Lab, name: str, *, memory_mb: int = 0, dirty_mb_s: float = 0.0) -> Workload:
        """The workload as the lab's configuration describes it, which says nothing of its network."""
        table = tomllib.loads(lab.config_path.read_text())["workloads"]
        if name not in table:
            raise LabError(f"{lab.config_path} has no workload {name!r}; there are: {', '.join(table)}")
        entry = table[name] | {"addresses": tuple(table[name]["addresses"])}
        return cls(name=name, memory_mb=memory_mb, dirty_mb_s=dirty_mb_s, **entry)

    @property
    def listens_on(self) -> list[str]:
        return [str(ipaddress.ip_interface(address).ip) for address in self.addresses]

    @property
    def data(self) -> str:
        """The directory of the host for what a service writes. A container has it as /mnt."""
        return f"{self.bundle or f'/srv/{self.name}'}/data"

    @property
    def command(self) -> list[str]:
        """The service's command line, the same in a container and as a plain process."""
        argv = ["python3", "-B", "-m", f"labs.programs.{self.program}", "--port", str(self.port)]
        for address in self.listens_on:
            argv += ["--address", address]
        argv += ["--memory-mb", str(self.memory_mb), "--dirty-mb-s", f"{self.dirty_mb_s:g}"]
        if self.program == "bookkeeper" and not self.container:
            argv += ["--books", self.data]
        return argv


def install(lab: Lab, workload: Workload) -> None:
    """Put what the workload needs on every host, the same on each: code and, for a container, its bundle.

    May be repeated, also with other sizes. Undo: `uninstall`.
    """
    _on_every_host(lab, lambda machine: _install(machine, workload))


def _install(machine: Host, workload: Workload) -> None:
    _install_code(machine)
    if workload.runtime == "podman":
        volumes = []
        if workload.program == "bookkeeper":
            _shell(machine, f"mkdir -p {workload.data}")  # podman creates no container with a directory missing
            volumes = [f"--volume={workload.data}:/mnt"]
        podman.install(machine, workload, workload.command, {"PYTHONPATH": CODE}, volumes)
    elif workload.container:
        _install_bundle(machine, workload)


def uninstall(lab: Lab, workload: Workload, host: str) -> None:
    """Take the workload's bundle off one host. The code stays: other workloads use it too."""
    if workload.runtime == "podman":
        podman.uninstall(lab.host(host), workload)
    if workload.bundle:
        _shell(lab.host(host), f"umount {workload.bundle}/rootfs && rm -r {workload.bundle}")


def start(lab: Lab, workload: Workload, host: str) -> None:
    """Start the installed workload on a host, with its addresses; return when it listens. Undo: `stop`."""
    machine = lab.host(host)
    with ExitStack() as undo:
        if workload.netns:
            undo.callback(machine.run, ["ip", "netns", "delete", workload.netns], check=False)
            own_network(machine, workload)
        for address in workload.addresses if not workload.netns else ():
            nodad = ["nodad"] if ":" in address else []
            machine.run(["ip", "address", "add", address, "dev", INTERFACE, *nodad])
            undo.callback(machine.run, ["ip", "address", "del", address, "dev", INTERFACE], check=False)
        _forget_neighbours(lab, workload)
        undo.callback(_end, machine, workload)
        if workload.program == "bookkeeper":
            mount_data(machine, workload)
            machine.run(["env", f"PYTHONPATH={CODE}", "python3", "-m", BOOKKEEPER, "--furnish", workload.data])
        if workload.container:
            _run_container(machine, workload)
        else:
            _run_process(machine, workload)
        _wait_until_listening(machine, workload)
        undo.pop_all()


def mount_data(machine: Host, workload: Workload) -> None:
    """A file system of its own for what a service writes: the host's root, an overlay, tells nobody what changes in it.

    Undo: `stop`."""
    _shell(machine, f"mkdir -p {workload.data} && mount -t tmpfs -o size={DATA_SIZE} data {workload.data}")


def stop(lab: Lab, workload: Workload) -> None:
    """End the workload wherever it is and take its addresses away, on every host. May be repeated."""
    _on_every_host(lab, lambda machine: _stop(machine, workload))


def _stop(machine: Host, workload: Workload) -> None:
    _end(machine, workload)
    if workload.program == "bookkeeper":
        _shell(machine, f"umount {workload.data} 2>/dev/null; rm -rf {workload.data} {LEFT_OVER}/{workload.name}.json")
    if workload.netns:
        machine.run(["ip", "netns", "delete", workload.netns], check=False)
    else:
        _shell(machine, "; ".join(f"ip address del {each} dev {INTERFACE}" for each in workload.addresses), check=False)


def where(lab: Lab, workload: Workload) -> list[str]:
    """The hosts on which something listens on the workload's address: one, if all is well."""
    listening = _on_every_host(lab, lambda machine: listening_pids(machine, workload))
    return [station.name for station, pids in zip(HOSTS, listening, strict=True) if pids]


def listening_pids(machine: Host, workload: Workload) -> list[str]:
    """The processes that listen on the workload's addresses, as the host counts. Asked of the sockets, not of a
    file: after a move no file need be where it was."""
    inside = ["nsenter", f"--net=/run/netns/{workload.netns}"] if workload.netns else []
    # Without the namespace there is nothing that could listen in it.
    sockets = machine.run([*inside, "ss", "-Hltunp", f"sport = :{workload.port}"], check=not inside).stdout.splitlines()
    # A program may have an IPv4 address on an IPv6 socket, as the JVM does.
    forms = {form for a in workload.listens_on for form in ((f"[{a}]",) if ":" in a else (a, f"[::ffff:{a}]"))}
    local = {f"{form}:{workload.port}" for form in forms}
    return sorted({pid for line in sockets if local & set(line.split()) for pid in re.findall(r"pid=(\d+)", line)})


def processes(machine: Host, workload: Workload) -> list[str]:
    """Those that listen, and all that they have started, as the host counts."""
    found = listening_pids(machine, workload)
    pairs = [line.split() for line in machine.run(["ps", "-e", "-o", "ppid=,pid="]).stdout.splitlines()]
    for each in found:  # it grows meanwhile
        found += [pid for parent, pid in pairs if parent == each and pid not in found]
    return found


def wrong_pages(lab: Lab, workload: Workload) -> str:
    """What a service with memory to check (``programs.memory_regions``) tells of the pages it found to be wrong."""
    machine = lab.host(where(lab, workload)[0])
    pid = listening_pids(machine, workload)[0]
    return machine.run(["cat", f"/proc/{pid}/root{NOTES}"], check=False).stdout


def _install_code(machine: Host) -> None:
    """Size and time of the files are the same everywhere: a mapped or open file is compared by them."""
    source = Path(__file__).parent / "programs"
    texts = {name: (source / name).read_text() for name in SERVICE_FILES}
    put = shlex.join(["python3", "-I", "-S", "-c", INSTALL_FILES, f"{CODE}/labs/programs"])
    machine.run(["sh", "-c", f"{put} && find {CODE} -exec touch --date=@0 {{}} +"], input=json.dumps(texts))


def _install_bundle(machine: Host, workload: Workload) -> None:
    assert workload.container
    description = oci.config(
        hostname=workload.name,
        command=workload.command,
        environment={"PYTHONPATH": CODE},
        name=workload.container,
        netns=workload.netns,
    )
    if workload.program == "household":
        _shell(machine, f"mkdir -p {workload.data} && touch --date=@0 {workload.data}/locked")
    if workload.program in ("household", "bookkeeper"):
        description = oci.with_a_household(description, workload.data)
    put_bundle(machine, workload, description)


def put_bundle(machine: Host, workload: Workload, description: dict[str, Any]) -> None:
    """Put a container's bundle on a host. May be repeated. Undo: `uninstall`."""
    rootfs = f"{workload.bundle}/rootfs"
    _shell(machine, oci.ROOT.format(rootfs=rootfs))
    machine.write_file(f"{workload.bundle}/config.json", json.dumps(description, indent=2) + "\n", 0o644)


def mac_of(workload: Workload) -> str:
    """The MAC of a workload's own interface."""
    return f"02:00:5e:00:54:{int(workload.listens_on[0].rpartition('.')[2]):02x}"


def own_network(machine: Host, workload: Workload) -> None:
    """A network namespace with the workload's addresses and MAC, as a container network plugin makes one."""
    name = workload.netns
    if workload.network == "veth":
        link = f"ip link add v-{name} type veth peer name eth0 netns {name} && ip link set v-{name} master {BRIDGE} up"
    else:
        link = f"ip link add link {INTERFACE} name m-{name} type macvlan mode bridge"
        link += f" && ip link set m-{name} netns {name} name eth0"
    inside = ["link set lo up", f"link set eth0 address {mac_of(workload)} up"]
    inside += [f"address add {each} dev eth0{' nodad' if ':' in each else ''}" for each in workload.addresses]
    # An address that stands alone has the segment by a route, as behind a router.
    inside += ["route add 192.0.2.0/24 dev eth0"] if workload.addresses[0].endswith("/32") else []
    inside += ["route add default via 192.0.2.2"]
    steps = [f"ip netns add {name}", link, *(f"ip -n {name} {step}" for step in inside)]
    _shell(machine, " && ".join(steps))


def _run_container(machine: Host, workload: Workload) -> None:
    assert workload.container
    log = f"/run/{workload.container}.log"
    argv = ["podman", "start", workload.container]
    if workload.bundle:
        argv = [workload.runtime, "run", "--detach", "--bundle", workload.bundle, workload.container]
    # A pipe to us would become part of the container, and could not be restored anywhere else.
    done = _shell(machine, f"{shlex.join(argv)} </dev/null >/dev/null 2>{log}", check=False)
    if done.returncode != 0:
        raise LabError(f"{machine.name}: {shlex.join(argv)} failed:\n{machine.run(['cat', log]).stdout}")


def _run_process(machine: Host, workload: Workload) -> None:
    assert workload.pid_file
    if workload.launch:
        machine.run(workload.launch)
        return
    daemon = [*workload.command, "--daemon", "--pid-file", workload.pid_file]
    machine.run(["env", f"PYTHONPATH={CODE}", *daemon])


def _wait_until_listening(machine: Host, workload: Workload) -> None:
    deadline = time.monotonic() + LISTEN_TIMEOUT_S
    while not listening_pids(machine, workload):
        if time.monotonic() > deadline or (workload.container and not _runs(machine, workload)):
            said = machine.run(["cat", f"/run/{workload.container}.log"], check=False).stdout
            raise LabError(f"{machine.name}: {workload.name} does not listen on port {workload.port}\n{said}".rstrip())
        time.sleep(0.02)


def _runs(machine: Host, workload: Workload) -> bool:
    assert workload.container
    if workload.runtime == "podman":
        return podman.status(machine, workload.container) == "running"
    state = machine.run([workload.runtime, "state", workload.container], check=False)
    return state.returncode == 0 and json.loads(state.stdout)["status"] in ("created", "running")


def _end(machine: Host, workload: Workload) -> None:
    """End the service on one host, container or process, whatever became of it."""
    forget = f"rm -f {workload.pid_file or f'/run/{workload.container}.log'}"
    if workload.runtime == "podman":
        podman.end(machine, workload)
    elif workload.container:
        forget += f"; {workload.runtime} delete --force {workload.container}"
    _shell(machine, forget, check=False)
    deadline = time.monotonic() + END_TIMEOUT_S
    while pids := processes(machine, workload):
        if time.monotonic() > deadline:
            raise LabError(f"{machine.name}: {workload.name} does not end: process {', '.join(pids)}")
        machine.run(["kill", "-KILL", *pids], check=False)


def _shell(machine: Host, script: str, *, check: bool = True) -> CompletedProcess[str]:
    return machine.run(["sh", "-c", script], check=check)


def _forget_neighbours(lab: Lab, workload: Workload) -> None:
    """Nobody may remember on which host the address was in an earlier test."""
    flushed = (f"ip {'-6' if ':' in each else '-4'} neighbour flush to {each}" for each in workload.listens_on)
    script = "; ".join(flushed)
    with ThreadPoolExecutor() as together:
        list(together.map(lambda each: lab.machine(each.name).run(["sh", "-c", script], check=False), STATIONS))


def _on_every_host(lab: Lab, do: Callable[[Host], T]) -> list[T]:
    """At the same time: of what is run on a host, most is waiting for it to begin and to end."""
    with ThreadPoolExecutor() as together:
        return list(together.map(lambda station: do(lab.host(station.name)), HOSTS))
