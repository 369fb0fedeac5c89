"""`netfix move` between real namespaces: the address is at one place only, and the segment follows it."""

import json
import subprocess
from collections.abc import Iterator

import pytest

from netfix import cli
from netfix.address import AddressRecord, FakeAddressBook, InterfaceRecord
from netfix.errors import AddressConflictError, KernelRefusedError, UsageError
from netfix.move import Place, transfer
from tests.contract.netfix_segment import SERVICE, SERVICE6, Namespace

MACS = {"one": "02:00:00:00:00:11", "two": "02:00:00:00:00:12"}
EACH_FAMILY = pytest.mark.parametrize(("address", "length"), [(SERVICE, 24), (SERVICE6, 64)])


def ip(namespace: Namespace, command: str) -> str:
    enter = ["nsenter", f"--net={namespace.namespace}", "ip", *command.split()]
    return subprocess.run(enter, check=True, capture_output=True, text=True).stdout


class Segment:
    """A peer that is the segment's bridge, two hosts on it, and the addresses on the first of them."""

    def __init__(self, peer: Namespace, one: Namespace, two: Namespace) -> None:
        self.peer, self.hosts = peer, {"one": one, "two": two}
        ip(peer, "link add br0 type bridge")
        ip(peer, "link set br0 up")
        for name, host in self.hosts.items():
            inside = host.namespace.split("/")[4]
            ip(peer, f"link add {name} type veth peer name eth0 address {MACS[name]} netns {inside}")
            ip(peer, f"link set {name} master br0 up")
            ip(host, "link set eth0 up")
            ip(host, "link set lo up")
        for address, length in ((SERVICE, 24), (SERVICE6, 64)):
            ip(one, f"address add {address}/{length} dev eth0 {'nodad' if ':' in address else ''}")
            ip(peer, f"neighbour replace {address} lladdr {MACS['one']} nud stale dev br0")

    def where(self, address: str) -> list[str]:
        return [name for name, host in self.hosts.items() if f" {address}/" in ip(host, "-o address show dev eth0")]

    def known_at(self, address: str) -> str:
        return ip(self.peer, f"neighbour show {address}").split("lladdr ")[1].split()[0]

    def place(self, name: str, interface: str = "eth0") -> str:
        return f"{interface}@{self.hosts[name].namespace}"


@pytest.fixture
def segment() -> Iterator[Segment]:
    with Namespace() as peer, Namespace() as one, Namespace() as two:
        yield Segment(peer, one, two)


def netfix(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["move", *arguments])
    return int(ended.value.code or 0)


@EACH_FAMILY
def test_an_address_moves_there_and_back(
    segment: Segment, capsys: pytest.CaptureFixture[str], address: str, length: int
) -> None:
    for here, there in (("one", "two"), ("two", "one")):
        places = ("--from", segment.place(here), "--to", segment.place(there))
        assert netfix(address, *places, "--json") == 0
        assert json.loads(capsys.readouterr().out) == {
            "address": address,
            "prefixlen": length,
            "mac": MACS[there],
            "others": [],
            "from": segment.place(here),
            "to": segment.place(there),
        }
        assert segment.where(address) == [there]
        assert segment.known_at(address) == MACS[there]


def test_between_two_interfaces_of_one_namespace(segment: Segment, capsys: pytest.CaptureFixture[str]) -> None:
    one = segment.hosts["one"]
    ip(one, "link add eth1 type veth peer name eth2")
    ip(one, "link set eth1 up")
    ip(one, "link set eth2 up")
    assert netfix(SERVICE, "--from", segment.place("one"), "--to", segment.place("one", "eth1")) == 0
    assert f"{SERVICE}/24 is on eth1@" in capsys.readouterr().out
    assert f" {SERVICE}/24 " in ip(one, "-o address show dev eth1")
    assert segment.where(SERVICE) == []


def test_another_host_that_answers_is_named(segment: Segment, capsys: pytest.CaptureFixture[str]) -> None:
    ip(segment.peer, f"address add {SERVICE}/24 dev br0")
    assert netfix(SERVICE, "--from", segment.place("one"), "--to", segment.place("two")) == 0
    said = capsys.readouterr()
    assert f"{SERVICE}/24 is on eth0@" in said.out
    assert f"answers for {SERVICE} as well" in said.err


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (("192.0.2.99", "one", "eth0", "two", "eth0"), 3, "netfix.address-conflict"),
        ((SERVICE, "one", "eth7", "two", "eth0"), 3, "netfix.no-such-interface"),
        ((SERVICE, "one", "eth0", "two", "eth7"), 3, "netfix.no-such-interface"),
        (("nobody", "one", "eth0", "two", "eth0"), 2, "netfix.address-invalid"),
    ],
)
def test_what_cannot_be_moved_stays(
    segment: Segment, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], status: int, code: str
) -> None:
    address, here, its, there, other = arguments
    places = ("--from", segment.place(here, its), "--to", segment.place(there, other))
    assert netfix(address, *places, "--json") == status
    assert json.loads(capsys.readouterr().out)["error"]["code"] == code
    assert segment.where(SERVICE) == ["one"]


def test_a_namespace_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert netfix(SERVICE, "--from", "eth0@nowhere", "--to", "eth0") == 2
    assert "there is no network namespace /run/netns/nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "@", "eth0@", "@blue"])
def test_what_is_no_place(text: str) -> None:
    with pytest.raises(UsageError):
        Place.parse(text)


def book(*records: AddressRecord) -> FakeAddressBook:
    link = InterfaceRecord(name="eth0", index=2, mac=MACS["one"], up=True, mtu=1500)
    return FakeAddressBook([link], records)


async def test_an_address_that_cannot_be_added_is_put_back() -> None:
    record = AddressRecord(SERVICE, 24, "eth0")
    here, there = book(record), book()
    there.fail_next = KernelRefusedError("no")
    with pytest.raises(KernelRefusedError):
        await transfer(record, here, there, Place("eth0"))
    assert (here.records, there.records) == ([record], [])


async def test_an_address_that_is_there_otherwise_stays_where_it_was() -> None:
    record, other = AddressRecord(SERVICE, 24, "eth0"), AddressRecord(SERVICE, 25, "eth0")
    here, there = book(record), book(other)
    with pytest.raises(AddressConflictError):
        await transfer(record, here, there, Place("eth0"))
    assert (here.records, there.records) == ([record], [other])
