"""A network namespace that is described, and made again elsewhere, is the same to its peers."""

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from netfix.attachment import Attachment, AttachmentError, Route, add, delete, describe, raise_up
from netfix.gate import CLOSED, OPEN, NftGate
from netfix.namespace import NamespaceExistsError, NoSuchNamespaceError, create, entered, remove, same
from tests.contract.netfix_segment import Namespace

MAC, MARK = "02:00:00:00:07:01", "02:00:00:00:07:02"
SYSCTL = "net/ipv4/conf/eth0/arp_ignore"
BUILD = {
    "veth": "ip link add vethsvc type veth peer name eth0 netns {pid} && ip link set vethsvc master br0 up",
    "macvlan": "ip link add link up0 name mv0 type macvlan mode bridge && ip link set mv0 netns {pid} name eth0",
}


class Host:
    """A host with a bridge and an uplink, whose other end is here too, and a namespace path."""

    def __init__(self, namespace: Namespace, path: Path) -> None:
        self.namespace = namespace
        self.path = path

    async def sh(self, *lines: str) -> str:
        def run() -> str:
            script = " && ".join(lines)
            return subprocess.run(["sh", "-ec", script], check=True, capture_output=True, text=True).stdout

        return await self.namespace.call(run)

    async def inside(self, *lines: str) -> str:
        return await self.sh(*(f"nsenter --net={self.path} {line}" for line in lines))


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[tuple[Host, Host]]:
    with Namespace() as one, Namespace() as two:
        both = Host(one, tmp_path / "one"), Host(two, tmp_path / "two")
        for host in both:
            await host.sh(
                "ip link add br0 type bridge stp_state 0",
                "ip link set br0 up",
                "ip link add up0 type veth peer name far0",
                "ip link set up0 up",
                "ip link set far0 up",
            )
        try:
            yield both
        finally:
            for host in both:
                remove(host.path)


async def build(host: Host, kind: str) -> None:
    await host.namespace.call(lambda: create(host.path))
    await host.sh(BUILD[kind].format(pid=host.path))
    await host.inside(
        f"ip link set eth0 address {MAC} mtu 1400",
        f"sh -c 'echo 1 >/proc/sys/{SYSCTL}'",
        "ip link set eth0 up",
        "ip address add 192.0.2.50/24 dev eth0",
        "ip address add 2001:db8::50/64 dev eth0 nodad",
        "ip route add default via 192.0.2.1 metric 5",
        "ip route add 198.51.100.0/24 dev eth0",
        "ip -6 route add default via 2001:db8::1",
    )


def expected(kind: str) -> Attachment:
    return Attachment(
        interface="eth0",
        kind=kind,
        parent={"veth": "br0", "macvlan": "up0"}[kind],
        host_end={"veth": "vethsvc", "macvlan": ""}[kind],
        mode={"veth": "", "macvlan": "bridge"}[kind],
        mac=MAC,
        mtu=1400,
        addresses=("192.0.2.50/24", "2001:db8::50/64"),
        routes=(
            Route("198.51.100.0/24", "", "", 0, 253, 3),
            Route("0.0.0.0/0", "192.0.2.1", "", 5, 0, 3),
            Route("::/0", "2001:db8::1", "", 1024, 0, 3),
        ),
        sysctls={},
    )


def without_sysctls(found: Attachment) -> Attachment:
    values = {name: getattr(found, name) for name in Attachment.__dataclass_fields__}
    return Attachment(**(values | {"sysctls": {}}))


@pytest.mark.parametrize("kind", ["veth", "macvlan"])
async def test_what_is_made_is_what_was_described(hosts: tuple[Host, Host], kind: str) -> None:
    source, destination = hosts
    await build(source, kind)
    found = await source.namespace.call(lambda: describe(source.path))
    assert without_sysctls(found) == expected(kind)
    assert found.sysctls[SYSCTL] == "1"
    await destination.namespace.call(lambda: create(destination.path))
    await destination.namespace.call(lambda: add(destination.path, found))
    assert "UP" not in (await destination.inside("ip -o link show eth0")).split(">")[0]
    with pytest.raises(AttachmentError, match="none"):
        await destination.namespace.call(lambda: describe(destination.path))
    await destination.namespace.call(lambda: raise_up(destination.path, found))
    made = await destination.namespace.call(lambda: describe(destination.path))
    assert without_sysctls(made) == without_sysctls(found)
    assert made.sysctls == found.sysctls
    await destination.namespace.call(lambda: delete(destination.path, "eth0"))
    await destination.namespace.call(lambda: delete(destination.path, "eth0"))
    assert "vethsvc" not in await destination.sh("ip -o link")
    remove(destination.path)
    remove(destination.path)
    await destination.namespace.call(lambda: delete(destination.path, "eth0"))


async def test_a_taken_name_of_the_other_end_is_no_trouble(hosts: tuple[Host, Host]) -> None:
    source, destination = hosts
    await build(source, "veth")
    found = await source.namespace.call(lambda: describe(source.path))
    await destination.sh("ip link add vethsvc type bridge")
    await destination.namespace.call(lambda: create(destination.path))
    await destination.namespace.call(lambda: add(destination.path, found))
    assert "veth0" in await destination.sh("ip -o link show master br0")


async def test_a_host_without_the_bridge_is_told(hosts: tuple[Host, Host]) -> None:
    source, destination = hosts
    await build(source, "veth")
    found = await source.namespace.call(lambda: describe(source.path))
    await destination.sh("ip link del br0")
    await destination.namespace.call(lambda: create(destination.path))
    with pytest.raises(AttachmentError, match="no br0"):
        await destination.namespace.call(lambda: add(destination.path, found))


async def test_a_veth_into_no_bridge_is_refused(hosts: tuple[Host, Host]) -> None:
    host = hosts[0]
    await host.namespace.call(lambda: create(host.path))
    await host.sh("ip link add x0 type veth peer name loose", f"ip link set x0 netns {host.path} up")
    with pytest.raises(AttachmentError, match="x0"):
        await host.namespace.call(lambda: describe(host.path))


async def test_namespaces_are_made_entered_and_removed(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    host = hosts[0]

    def look() -> tuple[bool, bool, bool]:
        ours = Path("/proc/thread-self/ns/net")
        before = same(host.path, ours)
        with entered(host.path):
            inside = same(host.path, ours)
            with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
                pass
        return before, inside, same(host.path, ours)

    await host.namespace.call(lambda: create(host.path))
    with pytest.raises(NamespaceExistsError):
        await host.namespace.call(lambda: create(host.path))
    assert await host.namespace.call(look) == (False, True, False)
    remove(host.path)
    assert not same(host.path, tmp_path)
    for call in (lambda: describe(host.path), lambda: entered(host.path).__enter__()):
        with pytest.raises(NoSuchNamespaceError):
            await host.namespace.call(call)


async def test_a_host_alone_that_does_not_answer_sends_no_frame(hosts: tuple[Host, Host]) -> None:
    """Not even those that the kernel sends by itself when an interface with IPv6 comes up."""
    source, destination = hosts
    await build(source, "macvlan")
    found = await source.namespace.call(lambda: describe(source.path))

    def tap(interface: str) -> socket.socket:
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(3))
        opened.bind((interface, 3))
        return opened

    def ask() -> None:
        for family, address in ((socket.AF_INET, "192.0.2.9"), (socket.AF_INET6, "2001:db8::9")):
            with (
                entered(destination.path),
                socket.socket(family, socket.SOCK_DGRAM) as asking,
                contextlib.suppress(PermissionError),
            ):
                asking.sendto(b"?", (address, 9))

    async def heard() -> set[str]:
        """Who has sent, up to now: a cable keeps the order, and the last frame is a mark."""
        marker.send(bytes.fromhex("ffffffffffff") + bytes.fromhex(MARK.replace(":", "")) + b"\x88\xb5")
        macs: set[str] = set()
        while MARK not in macs:
            frame = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(listener, 2048), 10)
            macs.add(frame[6:12].hex(":"))
        return macs

    listener = await destination.namespace.call(lambda: tap("far0"))
    marker = await destination.namespace.call(lambda: tap("up0"))
    await destination.namespace.call(lambda: create(destination.path))

    def make_gate() -> NftGate:
        with entered(destination.path):
            return NftGate("test", ["192.0.2.50", "2001:db8::50"], alone=True)

    gate = await destination.namespace.call(make_gate)
    try:
        await gate.set(CLOSED)
        await destination.namespace.call(lambda: add(destination.path, found))
        await destination.namespace.call(lambda: raise_up(destination.path, found))
        await destination.namespace.call(ask)
        assert MAC not in await heard()
        assert await gate.state() == CLOSED
        await gate.set(OPEN)
        await destination.namespace.call(ask)
        assert MAC in await heard()
    finally:
        gate.close()
        listener.close()
        marker.close()
