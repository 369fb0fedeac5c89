"""Real rulesets, as nft writes them, in a network namespace: whether every client of a service would be dropped."""

import socket
import subprocess
from collections.abc import Iterator

import pytest

from netfix.firewall import Ruleset, Service, drops, read_ruleset
from tests.contract.netfix_segment import HOST_MAC, PEER_MAC, SERVICE, SERVICE6, Namespace, add_veth

TCP, TCP6 = Service("tcp", SERVICE, 7000), Service("tcp", SERVICE6, 7000)
UDP = Service("udp", SERVICE, 7000)
EMPTY = """
table inet f {
    chain in {
        type filter hook input priority 0; policy drop;
        %s
    }
}
"""
USUAL = """
table inet filter {
    set open { type inet_service; flags interval; elements = { 22, 80, 443, 8000-8100 } }
    set blocked { type ipv4_addr; elements = { 198.51.100.7 } }
    chain extra {
        %s
    }
    chain input {
        type filter hook input priority filter; policy drop;
        iif lo accept
        ct state vmap { invalid : drop, established : accept, related : accept }
        ip saddr @blocked drop
        ip protocol icmp accept
        meta l4proto { icmpv6, igmp } accept
        tcp dport @open accept
        udp dport { 53, 123 } counter accept
        tcp flags & (fin | syn) == (fin | syn) log prefix "odd " drop
        jump extra
        counter reject with icmpx admin-prohibited
    }
}
"""


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace() as made:
        yield made


def load(namespace: Namespace, text: str) -> None:
    enter = ["nsenter", f"--net={namespace.namespace}", "nft", "-f", "-"]
    subprocess.run(enter, input=text, text=True, check=True)


async def ruleset_of(namespace: Namespace, text: str) -> Ruleset:
    load(namespace, text)
    return await namespace.call(read_ruleset)


async def dropped(namespace: Namespace, text: str, service: Service = TCP) -> str:
    return drops(await ruleset_of(namespace, text), service, "eth0", 7)


async def test_without_rules_nothing_is_dropped(namespace: Namespace) -> None:
    assert drops(await namespace.call(read_ruleset), TCP, "eth0", 7) == ""


@pytest.mark.parametrize(
    "rule",
    [
        "",
        "ct state established,related accept",
        "ct state != new accept",
        "tcp dport 22 accept",
        "tcp dport { 22, 80-90, 6999, 7001-7010 } accept",
        "tcp dport != 7000 accept",
        "tcp dport 1-6999 accept",
        "tcp dport > 7000 accept",
        "udp dport 7000 accept",
        "th dport vmap { 22 : accept, 7000 : drop }",
        "ip daddr 192.0.2.11 tcp dport 7000 accept",
        "ip daddr 198.51.100.0/24 accept",
        'iifname "eth1" accept',
        'iifname { "eth1", "wlan*" } accept',
        "iif lo accept",
        "meta nfproto ipv6 accept",
        "ip6 daddr ::/0 accept",
        "ip saddr 198.51.100.0/24 drop",
        "limit rate 5/second log",
        "return; accept",
    ],
)
async def test_a_chain_that_lets_no_client_in(namespace: Namespace, rule: str) -> None:
    assert await dropped(namespace, EMPTY % rule) == "inet f in"


@pytest.mark.parametrize(
    "rule",
    [
        "accept",
        "tcp dport 7000 accept",
        "tcp dport { 22, 7000 } accept",
        "tcp dport { 22, 6000-8000 } accept",
        "tcp dport { 7000-65535 } accept",
        "tcp dport != 22 accept",
        "tcp dport 6000-7000 accept",
        "th dport vmap { 22 : drop, 7000 : accept }",
        "ip daddr 192.0.2.0/24 tcp dport 7000 accept",
        "ip saddr 198.51.100.0/24 tcp dport 7000 accept",
        'iifname "eth0" accept',
        'iifname "eth*" accept',
        "iif 7 accept",
        "ct state new tcp dport 7000 accept",
        "ct state vmap { invalid : drop, new : accept }",
        "limit rate 5/second accept",
        "meta mark 1 accept",
        "fib daddr type local accept",
        "ip saddr . tcp dport { 198.51.100.7 . 7000 } accept",
    ],
)
async def test_a_chain_that_lets_some_in_or_perhaps(namespace: Namespace, rule: str) -> None:
    assert await dropped(namespace, EMPTY % rule) == ""


@pytest.mark.parametrize(
    ("extra", "service", "where"),
    [
        ("", TCP, "inet filter input"),
        ("", TCP6, "inet filter input"),
        ("", UDP, "inet filter input"),
        ("", Service("tcp", SERVICE, 8050), ""),
        ("", Service("udp", SERVICE, 53), ""),
        ("", Service("tcp", SERVICE, 53), "inet filter input"),
        ("tcp dport 7000 accept", TCP, ""),
        ("tcp dport 7000 accept", UDP, "inet filter input"),
        ("ip daddr 192.0.2.10 accept", TCP, ""),
        ("ip daddr 192.0.2.10 accept", TCP6, "inet filter input"),
        ("meta nfproto ipv4 return; accept", TCP, "inet filter input"),
        ("meta nfproto ipv4 return; accept", TCP6, ""),
    ],
)
async def test_an_usual_ruleset(namespace: Namespace, extra: str, service: Service, where: str) -> None:
    assert await dropped(namespace, USUAL % extra, service) == where


async def test_a_drop_in_any_chain_counts_and_only_where_packets_pass(namespace: Namespace) -> None:
    text = """
    table ip a {
        chain ok {
            type filter hook input priority 0; policy accept;
            tcp dport 7000 accept
        }
    }
    table ip6 b {
        chain no {
            type filter hook input priority 0; policy drop;
        }
    }
    table ip c {
        chain early {
            type filter hook prerouting priority -150; policy accept;
            tcp dport 7000 drop
        }
    }
    table ip d {
        chain out {
            type filter hook output priority 0; policy drop;
        }
    }
    table ip e {
        flags dormant;
        chain no {
            type filter hook input priority 0; policy drop;
        }
    }
    """
    ruleset = await ruleset_of(namespace, text)
    assert drops(ruleset, TCP, "eth0", 7) == "ip c early"
    assert drops(ruleset, UDP, "eth0", 7) == ""
    assert drops(ruleset, TCP6, "eth0", 7) == "ip6 b no"


async def test_what_is_said_is_what_the_kernel_does(namespace: Namespace) -> None:
    """A client behind a cable tries; with the rule gone it gets its answer (refused: nobody listens)."""
    from pyroute2 import AsyncIPRoute

    async def address(ip: str) -> None:
        async with AsyncIPRoute() as route:
            (index,) = await route.link_lookup(ifname="eth0")
            await route.addr("add", index=index, address=ip, prefixlen=24)

    def connect() -> str:
        with socket.create_server(("192.0.2.1", 0)) as _, socket.socket() as client:
            client.settimeout(0.3)
            try:
                client.connect((SERVICE, 7000))
            except TimeoutError:
                return "dropped"
            except ConnectionRefusedError:
                return "refused"
        return "connected"

    with Namespace() as peer:
        await add_veth(peer, "eth0", PEER_MAC, namespace, HOST_MAC)
        await peer.run(address("192.0.2.1"))
        await namespace.run(address(SERVICE))
        ruleset = await ruleset_of(namespace, USUAL.replace("counter reject with icmpx admin-prohibited", "") % "")
        assert drops(ruleset, TCP, "eth0", 7) == "inet filter input"
        assert await peer.call(connect) == "dropped"
        await ruleset_of(namespace, "insert rule inet filter input tcp dport 7000 accept")
        assert drops(await namespace.call(read_ruleset), TCP, "eth0", 7) == ""
        assert await peer.call(connect) == "refused"
