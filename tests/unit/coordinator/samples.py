"""A configuration of three hosts and two workloads, and facts in which the workload `counter` runs on alpha."""

from __future__ import annotations

from pathlib import Path

from coordinator.config import Configuration, parse
from coordinator.facts import SocketFacts, WorkloadFacts
from coordinator.fakes import FakeHost, FakeHosts, healthy_facts

ADDRESS = "192.0.2.200"
CIDR = "192.0.2.200/24"
ALPHA_MAC = "02:00:5e:00:53:0b"
BETA_MAC = "02:00:5e:00:53:0c"

WORKLOADS = """
[workloads.counter]
runtime = "runc"
container = "counter"
bundle = "/srv/counter"
addresses = ["192.0.2.200/24"]
[workloads.echo]
runtime = "process"
pid_file = "/run/echo.pid"
addresses = ["192.0.2.201/24"]
"""


def host_section(name: str, number: int) -> str:
    """A host's section; `write_keys` makes the files it names."""
    return f"""
[hosts.{name}]
ssh = "root@192.0.2.{number}"
key = "keys/operator"
known_hosts = "keys/known_hosts"
interface = "eth0"
"""


HOSTS = host_section("alpha", 11) + host_section("beta", 12) + host_section("gamma", 13)


def write_keys(folder: Path) -> None:
    """The key files that `host_section` names."""
    (folder / "keys").mkdir()
    (folder / "keys/operator").touch()
    (folder / "keys/known_hosts").touch()


def write_configuration(folder: Path) -> Path:
    """The whole sample in a folder."""
    write_keys(folder)
    path = folder / "livemove.toml"
    path.write_text(HOSTS + WORKLOADS)
    return path


def configuration(folder: Path) -> Configuration:
    """The sample, read."""
    path = write_configuration(folder)
    return parse(path.read_text(), path)


def tcp(local: str = ADDRESS, port: int = 7000, remote: str = "0.0.0.0", remote_port: int = 0) -> SocketFacts:
    """A listening socket, or a connection where a remote end is given."""
    state = "ESTABLISHED" if remote_port else "LISTEN"
    return SocketFacts(
        family="ipv6" if ":" in local else "ipv4",
        protocol="tcp",
        state=state,
        local=local,
        local_port=port,
        remote=remote,
        remote_port=remote_port,
    )


RUNNING = WorkloadFacts(
    state="running",
    root_pid=2100,
    pids=(2100, 2101),
    memory_bytes=64 << 20,
    sockets=(tcp(), tcp(remote="192.0.2.100", remote_port=40001)),
    addresses={CIDR: ("eth0",)},
)
ABSENT = WorkloadFacts(state="absent")


def hosts() -> FakeHosts:
    """alpha runs `counter`; beta and gamma could."""
    return FakeHosts(
        {
            "alpha": FakeHost(healthy_facts(11), {"counter": RUNNING}),
            "beta": FakeHost(healthy_facts(12), answers={ADDRESS: (ALPHA_MAC,)}),
            "gamma": FakeHost(healthy_facts(13)),
        }
    )
