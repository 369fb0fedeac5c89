"""Who may log in where: the operator's key, a host key for every host, and the files that say so on both sides."""

from __future__ import annotations

from pathlib import Path

from labs.commands import run
from labs.state import Paths
from labs.topology import HOSTS, Station, hosts_file

HOST_KEY = "etc/ssh/ssh_host_ed25519_key"
SSHD_CONFIG = """\
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
PrintMotd no
MaxStartups 100
MaxSessions 100
# Tests log in with wrong keys on purpose, and must not be locked out for it.
PerSourcePenalties no
PidFile /run/sshd.pid
Subsystem sftp internal-sftp
"""


def make(paths: Paths) -> None:
    """Make all keys, and the seed of every host: the files that let the operator in and name the machines."""
    _make_key(paths.operator_key, f"operator of livemove lab {paths.name}")
    authorized = _public(paths.operator_key)
    known = [_seed(paths, station, authorized) for station in HOSTS]
    paths.known_hosts.write_text("".join(known))


def _seed(paths: Paths, host: Station, authorized: str) -> str:
    """Write one host's seed; returns its line of known_hosts."""
    seed = paths.seed(host.name)
    for directory, mode in ((seed / "etc/ssh", 0o755), (seed / "root/.ssh", 0o700)):
        directory.mkdir(parents=True)
        directory.chmod(mode)
    (seed / "root").chmod(0o700)
    _make_key(seed / HOST_KEY, host.name)
    (seed / "etc/ssh/sshd_config").write_text(SSHD_CONFIG)
    (seed / "root/.ssh/authorized_keys").write_text(authorized)
    (seed / "etc/hosts").write_text(hosts_file())
    (seed / "etc/hostname").write_text(host.name + "\n")
    (seed / "etc/resolv.conf").write_text("")
    kind, key, _ = _public(seed / HOST_KEY).split(maxsplit=2)
    return f"{host.name},{host.address},{host.address6} {kind} {key}\n"


def _make_key(path: Path, comment: str) -> None:
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)])


def _public(path: Path) -> str:
    return path.with_name(path.name + ".pub").read_text()
