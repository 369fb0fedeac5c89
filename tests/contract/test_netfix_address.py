"""The contract of `AddressBook`, over rtnetlink and the fake."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from netfix.address import AddressBook, AddressRecord, FakeAddressBook, InterfaceRecord, NetlinkAddressBook
from netfix.errors import AddressConflictError, DependentAddressError, InvalidAddressError, NoSuchInterfaceError
from tests.contract.netfix_segment import (
    HOST,
    HOST_MAC,
    SERVICE,
    SERVICE6,
    Namespace,
    add_veth,
    segment,
)

ON_ETH0 = [AddressRecord(SERVICE, 24, "eth0"), AddressRecord(SERVICE6, 64, "eth0")]
EACH_RECORD = pytest.mark.parametrize("record", ON_ETH0, ids=["ipv4", "ipv6"])


def _sysctl(root: Path, promote: bool) -> Path:
    """A /proc/sys that says whether secondaries are promoted."""
    for scope in ("all", "eth0"):
        directory = root / "net/ipv4/conf" / scope
        directory.mkdir(parents=True)
        (directory / "promote_secondaries").write_text(f"{int(promote and scope == 'eth0')}\n")
    return root


async def _book(kind: str, host: Namespace, sysctl: Path, promote: bool) -> AddressBook:
    if kind == "netlink":
        return await host.call(lambda: NetlinkAddressBook(_sysctl(sysctl, promote)))
    eth0 = InterfaceRecord("eth0", 2, HOST_MAC, up=True, mtu=1500)
    eth1 = InterfaceRecord("eth1", 3, "02:00:00:00:01:02", up=True, mtu=1500)
    return FakeAddressBook([eth0, eth1], promote=promote)


@pytest.fixture(params=["netlink", "fake"])
async def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def host() -> AsyncIterator[Namespace]:
    """A host with two interfaces and no address on either (but link-local ones)."""
    with Namespace() as peer, Namespace() as namespace:
        await add_veth(namespace, "eth0", HOST_MAC, peer, "02:00:00:00:00:01")
        await add_veth(namespace, "eth1", "02:00:00:00:01:02", peer, "02:00:00:00:01:01")
        yield namespace


@pytest.fixture
async def book(kind: str, host: Namespace, tmp_path: Path) -> AsyncIterator[AddressBook]:
    made = await _book(kind, host, tmp_path, promote=True)
    yield made
    made.close()


@EACH_RECORD
async def test_what_is_added_is_found_and_what_is_removed_is_not(book: AddressBook, record: AddressRecord) -> None:
    assert await book.find(record.address) == []
    await book.add(record)
    assert await book.find(record.address) == [record]
    assert record in await book.on_interface("eth0")
    assert record not in await book.on_interface("eth1")
    await book.remove(record)
    assert await book.find(record.address) == []


@EACH_RECORD
async def test_adding_and_removing_are_idempotent(book: AddressBook, record: AddressRecord) -> None:
    await book.remove(record)
    await book.add(record)
    await book.add(record)
    assert await book.find(record.address) == [record]
    await book.remove(record)
    await book.remove(record)


@EACH_RECORD
async def test_the_same_address_elsewhere_is_a_conflict(book: AddressBook, record: AddressRecord) -> None:
    await book.add(record)
    for other in (
        AddressRecord(record.address, record.prefixlen, "eth1"),
        AddressRecord(record.address, record.prefixlen - 1, "eth0"),
    ):
        with pytest.raises(AddressConflictError, match=r"eth0"):
            await book.add(other)
    assert await book.find(record.address) == [record]


async def test_an_ipv6_address_is_no_source_for_others(book: AddressBook) -> None:
    await book.add(ON_ETH0[1])
    (found,) = await book.find(SERVICE6)
    assert found.deprecated


async def test_an_address_is_found_in_any_spelling(book: AddressBook) -> None:
    await book.add(ON_ETH0[1])
    assert await book.find("2001:0DB8:0::0010") == [ON_ETH0[1]]
    with pytest.raises(InvalidAddressError):
        await book.find("192.0.2")


async def test_interfaces_are_described(book: AddressBook) -> None:
    interface = await book.interface("eth0")
    assert (interface.name, interface.mac, interface.up, interface.mtu) == ("eth0", HOST_MAC, True, 1500)
    assert interface.index > 1


async def test_unknown_interfaces_are_an_error_but_for_removal(book: AddressBook) -> None:
    absent = AddressRecord(SERVICE, 24, "eth7")
    for call in (book.interface("eth7"), book.on_interface("eth7"), book.add(absent)):
        with pytest.raises(NoSuchInterfaceError, match="eth7"):
            await call
    with pytest.raises(NoSuchInterfaceError):
        await book.interface("a-name-that-is-much-too-long")
    await book.remove(absent)


@pytest.mark.parametrize("promote", [True, False])
async def test_an_address_does_not_take_others_with_it(
    kind: str, host: Namespace, tmp_path: Path, promote: bool
) -> None:
    """The service's address came first, the host's own is its secondary: the kernel would remove both."""
    if kind == "netlink":
        sysctl = Path("/proc/sys/net/ipv4/conf/eth0/promote_secondaries")
        await host.call(lambda: sysctl.write_text("1" if promote else "0"))
    book = await _book(kind, host, tmp_path, promote)
    own = AddressRecord(HOST, 24, "eth0")
    try:
        await book.add(ON_ETH0[0])
        await book.add(own)
        assert (await book.find(HOST))[0].secondary
        if promote:
            await book.remove(ON_ETH0[0])
        else:
            with pytest.raises(DependentAddressError, match=HOST):
                await book.remove(ON_ETH0[0])
        assert await book.find(HOST) == [own]
        await book.remove(own)
    finally:
        book.close()
        shutil.rmtree(tmp_path / "net", ignore_errors=True)


async def test_adding_and_removing_tells_nobody() -> None:
    """No gratuitous ARP, no duplicate address detection, no advertisement: only `announce` tells."""
    async with segment() as cable:
        book = await cable.host.call(NetlinkAddressBook)
        try:
            await cable.arrived()
            for record in (AddressRecord("192.0.2.11", 24, "eth0"), AddressRecord("2001:db8::11", 64, "eth0")):
                await book.add(record)
                spoke = [f for f in await cable.arrived() if record.address in f.show(dump=True)]
                assert spoke == []
                await book.remove(record)
        finally:
            book.close()
