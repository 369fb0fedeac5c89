"""What a gate does to real packets, on a cable between two network namespaces: invariant I2, seen from the peer."""

import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from pyroute2 import AsyncIPRoute
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet

from netfix import nft
from netfix.announce import announcement_frames, probe_frames
from netfix.frames import PacketFramePort, announce
from netfix.gate import CLOSED, FREEZING, HOLDING, OPEN, SILENT, STATES, GateState, NftGate, find_gates, remove_gate
from netfix.netlink import NETLINK_NETFILTER, NetlinkSocket
from tests.contract.netfix_segment import (
    EACH_FAMILY,
    HOST6,
    HOST_MAC,
    NOBODY,
    NOBODY6,
    PEER,
    PEER6,
    PEER_MAC,
    SERVICE,
    SERVICE6,
    Segment,
    family_of,
)

EACH_STATE = pytest.mark.parametrize("state", STATES.values(), ids=list(STATES))


def _ip(source: str, destination: str) -> Packet:
    return IPv6(src=source, dst=destination) if ":" in source else IP(src=source, dst=destination)


def _peer_of(address: str) -> str:
    return PEER6 if ":" in address else PEER


def _process_with(connection: socket.socket) -> subprocess.Popen[bytes]:
    """A process that has the connection open, and does not read from it."""
    return subprocess.Popen(["sleep", "60"], pass_fds=[connection.fileno()])


def _from(frames: list[Packet], address: str) -> list[Packet]:
    """The packets among these that come from the address, other than neighbour discovery."""
    layer = IPv6 if ":" in address else IP
    discovery = (ICMPv6ND_NA, ICMPv6ND_NS)
    return [f for f in frames if layer in f and f[layer].src == address and not any(k in f for k in discovery)]


def _teaches(frames: list[Packet], address: str) -> list[Packet]:
    """The frames among these from which a neighbour would learn that the address is at their sender."""
    return [
        f
        for f in frames
        if (ARP in f and f[ARP].psrc == address)
        or (ICMPv6ND_NA in f and f[ICMPv6ND_NA].tgt == address)
        or (ICMPv6ND_NS in f and f[IPv6].src == address)
    ]


@EACH_FAMILY
@EACH_STATE
async def test_a_closed_port_sends_a_reset_only_while_packets_pass(
    cable: Segment, gate: NftGate, state: GateState, address: str
) -> None:
    await gate.set(state)
    syn = Ether(src=PEER_MAC, dst=HOST_MAC) / _ip(_peer_of(address), address) / TCP(dport=4, flags="S")
    await cable.transmit(bytes(syn))
    answers = _from(await cable.arrived(), address)
    if state.passing:
        assert [str(answer[TCP].flags) for answer in answers] == ["RA"]
    else:
        assert answers == []


@EACH_STATE
async def test_a_closed_udp_port_is_unreachable_only_while_packets_pass(
    cable: Segment, gate: NftGate, state: GateState
) -> None:
    await gate.set(state)
    datagram = Ether(src=PEER_MAC, dst=HOST_MAC) / _ip(PEER, SERVICE) / UDP(dport=4)
    await cable.transmit(bytes(datagram))
    answers = _from(await cable.arrived(), SERVICE)
    assert [answer[ICMP].type for answer in answers] == ([3] if state.passing else [])


@EACH_FAMILY
@EACH_STATE
async def test_the_host_answers_a_probe_only_while_answering(
    cable: Segment, gate: NftGate, state: GateState, address: str
) -> None:
    await gate.set(state)
    for frame in probe_frames(address, PEER_MAC):
        await cable.transmit(frame)
    assert bool(_teaches(await cable.arrived(), address)) is state.answering


@EACH_STATE
async def test_the_host_answers_a_unicast_solicitation_only_while_answering(
    cable: Segment, gate: NftGate, state: GateState
) -> None:
    """A peer that checks its neighbour (RFC 4861 section 7.3.3) asks the address itself, not the group."""
    await gate.set(state)
    ip = IPv6(src=PEER6, dst=SERVICE6, hlim=255)
    await cable.transmit(bytes(Ether(src=PEER_MAC, dst=HOST_MAC) / ip / ICMPv6ND_NS(tgt=SERVICE6)))
    assert bool(_teaches(await cable.arrived(), SERVICE6)) is state.answering


@EACH_FAMILY
@EACH_STATE
async def test_a_host_that_asks_for_a_neighbour_does_not_teach_the_address(
    cable: Segment, gate: NftGate, state: GateState, address: str
) -> None:
    """A packet from the service address to an unknown neighbour: the question for it would bear the address."""
    await gate.set(state)
    unknown = NOBODY6 if ":" in address else NOBODY

    def send() -> None:
        with socket.socket(family_of(address), socket.SOCK_DGRAM) as service:
            service.bind((address, 0))
            try:
                service.sendto(b"x", (unknown, 9))
            except PermissionError:
                assert not state.passing

    await cable.host.call(send)
    frames = await cable.arrived()
    assert bool(_teaches(frames, address)) is (state == OPEN)


@EACH_STATE
async def test_what_the_kernel_announces_by_itself_leaves_only_while_answering(
    cable: Segment, gate: NftGate, state: GateState
) -> None:
    """With arp_notify and ndisc_notify on, setting an interface's MAC makes it announce all its addresses."""
    await gate.set(state)

    async def provoke() -> None:
        for knob in ("ipv4/conf/eth0/arp_notify", "ipv6/conf/eth0/ndisc_notify"):
            (Path("/proc/sys/net") / knob).write_text("1")
        async with AsyncIPRoute() as route:
            (index,) = await route.link_lookup(ifname="eth0")
            await route.link("set", index=index, address=HOST_MAC)

    await cable.host.run(provoke())
    frames = await cable.arrived()
    assert _teaches(frames, HOST6), "it does announce the host's own"
    for address in (SERVICE, SERVICE6):
        assert bool(_teaches(frames, address)) is state.answering


@EACH_FAMILY
@pytest.mark.parametrize("unread", [True, False], ids=["reset", "fin"])
@pytest.mark.parametrize("state", [OPEN, FREEZING, CLOSED, HOLDING], ids=["open", "freezing", "closed", "holding"])
async def test_a_killed_service_dies_in_silence_behind_a_shut_gate(
    cable: Segment, gate: NftGate, address: str, state: GateState, unread: bool
) -> None:
    """The kernel closes its connections: with a RST where data was not read, else with a FIN."""
    listener = await cable.host.call(lambda: socket.create_server((address, 0), family=family_of(address)))
    with listener:
        port = listener.getsockname()[1]
        client = await cable.peer.call(lambda: socket.create_connection((address, port), timeout=5))
        with client:
            connection, _ = listener.accept()
            with connection, _process_with(connection) as service:
                connection.close()
                if unread:
                    client.sendall(b"nobody will read this")
                assert _from(await cable.arrived(), address), "the handshake was seen"
                await gate.set(state)
                service.kill()
            farewells = [str(packet[TCP].flags) for packet in _from(await cable.arrived(), address)]
            assert farewells == ([] if not state.passing else ["RA"] if unread else ["FA"])


@EACH_FAMILY
async def test_nothing_reaches_a_socket_behind_a_closed_gate(cable: Segment, gate: NftGate, address: str) -> None:
    """What arrives after the freeze must not get into queues that are being dumped."""
    listener = await cable.host.call(lambda: socket.create_server((address, 0), family=family_of(address)))
    with listener:
        port = listener.getsockname()[1]
        client = await cable.peer.call(lambda: socket.create_connection((address, port), timeout=5))
        service, _ = listener.accept()
        with client, service:
            await gate.set(CLOSED)
            client.sendall(b"too late")
            await cable.arrived()
            with pytest.raises(BlockingIOError):
                service.recv(16, socket.MSG_DONTWAIT)


@EACH_FAMILY
@EACH_STATE
async def test_datagrams_of_a_task_that_is_not_frozen_yet_leave(
    cable: Segment, gate: NftGate, state: GateState, address: str
) -> None:
    """What a connection cannot send stays in its queue; a datagram that is dropped is nowhere any more."""
    # The neighbours know each other, as those of a service that is moved do.
    listener = await cable.host.call(lambda: socket.create_server((address, 0), family=family_of(address)))
    with listener:
        port = listener.getsockname()[1]
        client = await cable.peer.call(lambda: socket.create_connection((address, port), timeout=5))
    service = await cable.host.call(lambda: socket.socket(family_of(address), socket.SOCK_DGRAM))
    with client, service:
        service.bind((address, 0))
        await gate.set(state)
        try:
            service.sendto(b"last words", (_peer_of(address), 9))
        except PermissionError:
            assert not (state.passing or state.datagrams)
        left = [packet for packet in _from(await cable.arrived(), address) if UDP in packet]
    assert len(left) == (state.passing or state.datagrams)


async def test_a_silent_service_goes_on_answering_its_clients(cable: Segment, gate: NftGate) -> None:
    listener = await cable.host.call(lambda: socket.create_server((SERVICE, 0)))
    with listener:
        port = listener.getsockname()[1]
        client = await cable.peer.call(lambda: socket.create_connection((SERVICE, port), timeout=5))
        with client:
            service, _ = listener.accept()
            with service:
                await gate.set(SILENT)
                client.sendall(b"ping")
                assert service.recv(16) == b"ping"
                service.sendall(b"pong")
                assert client.recv(16) == b"pong"


async def test_a_client_on_the_host_itself_meets_the_closed_gate(cable: Segment, gate: NftGate) -> None:
    """It gets no refusal: its SYN is dropped on its way, and a local sender may be told so."""

    def refused() -> bool:
        with socket.socket() as client:
            client.setblocking(False)
            return client.connect_ex((SERVICE, 4)) != 115 or _refused_at_once(client)

    await gate.set(OPEN)
    assert await cable.host.call(refused)
    for state in (CLOSED, HOLDING):
        await gate.set(state)
        assert not await cable.host.call(refused)


def _refused_at_once(client: socket.socket) -> bool:
    """Over loopback a RST has arrived when connect returns."""
    return client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 111


async def test_announcements_leave_a_closed_gate(cable: Segment, gate: NftGate) -> None:
    """Frames from a packet socket do not pass nftables."""
    port = await cable.host.call(lambda: PacketFramePort("eth0"))
    try:
        await gate.set(CLOSED)
        for address in (SERVICE, SERVICE6):
            await announce(port, announcement_frames(address, HOST_MAC), repeats=0)
        frames = await cable.arrived()
        assert len(_teaches(frames, SERVICE)) == 2 * 3
        assert len(_teaches(frames, SERVICE6)) == 3
    finally:
        port.close()


def _ruleset() -> str:
    """The whole ruleset: as `nft` shows it where there is one, else what our own dumps say."""
    if shutil.which("nft"):
        return subprocess.run(["nft", "list", "ruleset"], check=True, capture_output=True, text=True).stdout
    with NetlinkSocket(NETLINK_NETFILTER, "test") as netlink:
        return repr((nft.tables(netlink), nft.chains(netlink), nft.rules(netlink)))


@EACH_STATE
async def test_removal_leaves_the_ruleset_as_it_was(cable: Segment, gate: NftGate, state: GateState) -> None:
    other = await cable.host.call(lambda: NftGate("other", [SERVICE]))
    try:
        await other.set(SILENT)
        before = await cable.host.call(_ruleset)
        await gate.set(state)
        during = await cable.host.call(_ruleset)
        await gate.remove()
        assert await cable.host.call(_ruleset) == before != during
    finally:
        other.close()


async def test_gates_are_found_and_removed_by_their_id_alone(cable: Segment, gate: NftGate) -> None:
    await gate.set(HOLDING)
    (report,) = await cable.host.run(find_gates())
    assert (report.migration_id, report.state) == ("test", HOLDING)
    assert set(report.addresses) == {SERVICE, SERVICE6}
    await cable.host.run(remove_gate("test"))
    await cable.host.run(remove_gate("test"))
    assert await cable.host.run(find_gates()) == []


async def test_the_namespaces_are_our_own(cable: Segment) -> None:
    """These tests touch nothing of the machine they run on."""
    names = {Path(name).stat().st_ino for name in (cable.peer.namespace, cable.host.namespace, "/proc/self/ns/net")}
    assert len(names) == 3
