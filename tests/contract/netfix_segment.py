"""Network namespaces for tests: hosts that are threads of their own namespace, and one cable between two of them.

A namespace lives as long as its thread: when a test is over, threads end, and everything in it is gone.
"""

import asyncio
import ctypes
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest
from pyroute2 import AsyncIPRoute
from scapy.layers.l2 import ARP, Ether

from netfix.announce import probe_frames

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_WAIT_S = 10
_ETH_P_ALL = 0x0003

PEER_MAC, HOST_MAC = "02:00:00:00:00:01", "02:00:00:00:00:02"
PEER, HOST = "192.0.2.1", "192.0.2.2"
PEER6, HOST6 = "2001:db8::1", "2001:db8::2"
SERVICE, SERVICE6 = "192.0.2.10", "2001:db8::10"
NOBODY, NOBODY6 = "192.0.2.77", "2001:db8::77"
EACH_FAMILY = pytest.mark.parametrize("address", [SERVICE, SERVICE6])


def family_of(address: str) -> socket.AddressFamily:
    """The family of an address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class Namespace:
    """A thread with an event loop in a network namespace of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.namespace = ""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def _live(self) -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) == 0:
            self.namespace = f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net"
        self._ready.set()
        if self.namespace:
            self.loop.run_forever()
        self.loop.close()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(_WAIT_S)
        assert self.namespace, "these tests make network namespaces, and need root for that"
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_WAIT_S)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the namespace."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        return await asyncio.wait_for(asyncio.wrap_future(future), _WAIT_S)

    async def call(self, function: Callable[[], T]) -> T:
        """Call a function in the namespace."""

        async def work() -> T:
            return function()

        return await self.run(work())


async def add_veth(namespace: Namespace, name: str, mac: str, peer: Namespace, peer_mac: str) -> None:
    """A cable: `name` in both namespaces, both ends up."""

    async def cable() -> None:
        descriptor = os.open(peer.namespace, os.O_RDONLY)
        try:
            async with AsyncIPRoute() as route:
                end = {"ifname": name, "address": peer_mac, "net_ns_fd": descriptor}
                await route.link("add", ifname=name, kind="veth", address=mac, peer=end)
        finally:
            os.close(descriptor)

    await namespace.run(cable())
    for one in (namespace, peer):
        await one.run(_up(name))


async def _up(name: str) -> None:
    dad = Path(f"/proc/sys/net/ipv6/conf/{name}/accept_dad")
    if dad.exists():
        dad.write_text("0")
    async with AsyncIPRoute() as route:
        for interface in ("lo", name):
            (index,) = await route.link_lookup(ifname=interface)
            await route.link("set", index=index, state="up")


async def _addresses(*addresses: tuple[str, int]) -> None:
    async with AsyncIPRoute() as route:
        (index,) = await route.link_lookup(ifname="eth0")
        for address, prefixlen in addresses:
            flags = {"IFA_FLAGS": 0x02} if ":" in address else {}
            await route.addr("add", index=index, address=address, prefixlen=prefixlen, **flags)


async def _neighbours(*neighbours: tuple[str, str]) -> None:
    async with AsyncIPRoute() as route:
        (index,) = await route.link_lookup(ifname="eth0")
        for address, mac in neighbours:
            await route.neigh("replace", dst=address, lladdr=mac, ifindex=index, state=0x80)


class Segment:
    """A peer and a host on one cable; the host has the service addresses too, and knows the peer's MAC for good."""

    def __init__(self, peer: Namespace, host: Namespace) -> None:
        self.peer = peer
        self.host = host
        self._tap: socket.socket | None = None

    async def build(self) -> None:
        """Cable, addresses, neighbours; then listen on the peer's end."""
        await add_veth(self.peer, "eth0", PEER_MAC, self.host, HOST_MAC)
        await self.peer.run(_addresses((PEER, 24), (PEER6, 64)))
        await self.host.run(_addresses((HOST, 24), (HOST6, 64), (SERVICE, 24), (SERVICE6, 64)))
        await self.host.run(_neighbours((PEER, PEER_MAC), (PEER6, PEER_MAC)))
        await self.peer.run(_neighbours((SERVICE, HOST_MAC), (SERVICE6, HOST_MAC)))

        def tap() -> socket.socket:
            opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
            opened.bind(("eth0", _ETH_P_ALL))
            return opened

        self._tap = await self.peer.call(tap)

    async def transmit(self, frame: bytes) -> None:
        """Put a frame on the cable at the peer's end."""
        assert self._tap is not None
        self._tap.send(frame)

    async def arrived(self) -> list[Any]:
        """All frames (scapy) that the host has put on the cable up to now.

        What marks "now": an ARP question for the host's own address, which it answers in every state of the gate. A
        cable keeps the order, so whatever the host had to say before, it has said when that answer arrives.
        """
        assert self._tap is not None
        loop = asyncio.get_running_loop()
        (question,) = probe_frames(HOST, PEER_MAC)
        await self.transmit(question)
        frames: list[Any] = []
        while True:
            raw = await asyncio.wait_for(loop.sock_recv(self._tap, 4096), _WAIT_S)
            frame = Ether(raw)
            if frame.src != HOST_MAC:
                continue
            if ARP in frame and frame[ARP].op == 2 and frame[ARP].psrc == HOST:
                return frames
            frames.append(frame)

    def close(self) -> None:
        """Stop listening."""
        if self._tap is not None:
            self._tap.close()


@asynccontextmanager
async def segment() -> AsyncIterator[Segment]:
    """A segment that is gone at the end."""
    with Namespace() as peer, Namespace() as host:
        built = Segment(peer, host)
        try:
            await built.build()
            yield built
        finally:
            built.close()
