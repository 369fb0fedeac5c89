"""Other ways for an address to move than on one segment: hooks that the hosts have, and a host that is a router."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from labs.lab import Lab
from labs.topology import INTERFACE
from tests.integration.command import Said

HOSTS = ("alpha", "beta")
HOOK = "/usr/local/sbin/move-address"
KEY, KNOWN_HOSTS = "/etc/livemove/router_key", "/etc/livemove/router_known_hosts"

#: Keeps a diary.
DIARY_SCRIPT = """\
#!/usr/bin/python3
import os, socket, sys
action, role = os.environ["LIVEMOVE_ACTION"], os.environ["LIVEMOVE_ROLE"]
with open("/run/move-address.diary", "a") as diary:
    print(action, role, os.environ["LIVEMOVE_FROM"], os.environ["LIVEMOVE_TO"], file=diary)
if os.path.exists("/run/move-address.fails"):
    sys.exit("error: the cloud is out of order")
"""

#: The same, and tells the segment where the address is by a gratuitous ARP of its own.
HOOK_SCRIPT = f"""{DIARY_SCRIPT}
if (action, role) in (("divert", "destination"), ("back", "source")):
    own = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    own.bind((os.environ["LIVEMOVE_INTERFACE"], 0))
    mac, address = own.getsockname()[4], socket.inet_aton(os.environ["LIVEMOVE_ADDRESS"])
    arp = bytes.fromhex("0001080006040002") + mac + address + mac + address
    for _ in range(3):
        own.send((b"\\xff" * 6 + mac + bytes.fromhex("0806") + arp).ljust(60, b"\\0"))
"""


@contextmanager
def installed_hook(lab: Lab, script: str = HOOK_SCRIPT) -> Iterator[None]:
    """Both hosts have the hook."""
    for name in HOSTS:
        lab.host(name).write_file(HOOK, script, 0o755)
    try:
        yield
    finally:
        for name in HOSTS:
            lab.host(name).run(["sh", "-c", f"rm -f {HOOK} /run/move-address.*"])


def diary(lab: Lab, host: str) -> list[str]:
    """What the hook was asked on a host since the last look."""
    said = lab.host(host).run(["sh", "-c", "cat /run/move-address.diary; rm -f /run/move-address.diary"]).stdout
    return said.splitlines()


def warnings(said: Said) -> list[str]:
    """What went other than planned; what a machine for tests lacks is found before."""
    ours = ("CAP_SYS_RESOURCE", "pre-copy gave up")  # the latter where the machine is busy with other work
    return [warning for warning in said.report["warnings"] if not any(each in warning for each in ours)]


@contextmanager
def router(lab: Lab, address: str) -> Iterator[None]:
    """gamma forwards to the service, which clients reach through it; alpha and beta may log in there."""
    gamma, clients = lab.host("gamma"), lab.machine("clients")
    authorized = "/root/.ssh/authorized_keys"
    with ExitStack() as undo:
        for host in HOSTS:
            undo.callback(lab.host(host).run, ["rm", "-rf", "/etc/livemove"])
            lab.host(host).run(["mkdir", "-p", "/etc/livemove"])
        lab.host("alpha").run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", KEY])
        lab.host("beta").write_file(KEY, lab.host("alpha").read_file(KEY), 0o600)
        for host in HOSTS:
            lab.host(host).write_file(KNOWN_HOSTS, lab.paths.known_hosts.read_text())
        before = gamma.read_file(authorized)
        undo.callback(gamma.write_file, authorized, before, 0o600)
        gamma.write_file(authorized, before + lab.host("alpha").read_file(f"{KEY}.pub"), 0o600)
        # It is a router on a stick: it would tell the clients that there is a shorter way.
        shell = (
            f"cd /proc/sys/net/ipv4; for each in conf/all conf/{INTERFACE}; do echo {{}} >$each/send_redirects; done"
        )
        gamma.run(["sh", "-ec", f"{shell.format(0)}; echo 1 >ip_forward"])
        undo.callback(gamma.run, ["sh", "-ec", f"{shell.format(1)}; echo 0 >ip_forward"])
        gamma.run(["ip", "route", "add", f"{address}/32", "via", lab.host("alpha").address])
        undo.callback(gamma.run, ["ip", "route", "del", f"{address}/32"])
        clients.run(["ip", "route", "add", f"{address}/32", "via", gamma.address])
        undo.callback(clients.run, ["ip", "route", "del", f"{address}/32"])
        yield


def next_hop(lab: Lab, address: str) -> str:
    """Where the router sends the service's packets."""
    return lab.host("gamma").run(["ip", "route", "show", f"{address}/32"]).stdout.split()[2]
