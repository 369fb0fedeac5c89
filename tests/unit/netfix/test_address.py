"""Reading addresses, and the decisions about adding and removing them."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netfix.address import AddressRecord, FakeAddressBook, InterfaceRecord, ServiceAddress, dependents
from netfix.errors import InvalidAddressError, KernelRefusedError
from netfix.unicast import parse_address


@pytest.mark.parametrize(
    ("text", "address", "prefixlen"),
    [
        ("192.0.2.10/24", "192.0.2.10", 24),
        ("192.0.2.10/32", "192.0.2.10", 32),
        ("192.0.2.0/31", "192.0.2.0", 31),
        ("2001:db8::10/64", "2001:db8::10", 64),
        ("2001:DB8:0:0::10/128", "2001:db8::10", 128),
    ],
)
def test_service_addresses_are_read(text: str, address: str, prefixlen: int) -> None:
    parsed = ServiceAddress.parse(text)
    assert (parsed.address, parsed.prefixlen) == (address, prefixlen)
    assert str(parsed) == f"{address}/{prefixlen}"
    assert parsed.on("eth0") == AddressRecord(address, prefixlen, "eth0")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("192.0.2.10", "no prefix length"),
        ("192.0.2.10/", "prefix length must be"),
        ("192.0.2.10/33", "from 1 to 32"),
        ("192.0.2.10/0", "from 1 to 32"),
        ("192.0.2.10/+24", "prefix length must be"),
        ("192.0.2.10/255.255.255.0", "prefix length must be"),
        ("2001:db8::10/129", "from 1 to 128"),
        ("192.0.2.0/24", "the network itself"),
        ("192.0.2.255/24", "the network itself"),
        ("2001:db8::/64", "the network itself"),
        (" 192.0.2.10/24", "not an IP address"),
        ("192.0.2.010/24", "not an IP address"),
        ("/24", "not an IP address"),
        ("", "not an IP address"),
    ],
)
def test_what_is_no_service_address_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(InvalidAddressError, match=reason) as caught:
        ServiceAddress.parse(text)
    assert caught.value.hint
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    "text",
    ["127.0.0.1", "::1", "0.0.0.0", "::", "224.0.0.1", "ff02::1", "fe80::1", "2001:db8::1%eth0", "::ffff:192.0.2.1"],
)
def test_addresses_that_cannot_move_are_refused(text: str) -> None:
    with pytest.raises(InvalidAddressError):
        parse_address(text)


@given(st.ip_addresses(network="192.0.2.0/24") | st.ip_addresses(network="2001:db8::/32"))
def test_every_spelling_gives_one_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    assert parse_address(str(address)) == parse_address(address.exploded) == address


def test_family() -> None:
    assert AddressRecord("192.0.2.1", 24, "eth0").family == "ipv4"
    assert AddressRecord("2001:db8::1", 64, "eth0").family == "ipv6"


def test_what_the_kernel_reports_beside_does_not_make_another_record() -> None:
    assert AddressRecord("192.0.2.1", 24, "eth0", secondary=True) == AddressRecord("192.0.2.1", 24, "eth0")


def test_dependents_are_the_secondaries_of_the_same_subnet() -> None:
    first = AddressRecord("192.0.2.10", 24, "eth0")
    second = AddressRecord("192.0.2.2", 24, "eth0", secondary=True)
    others = [
        AddressRecord("192.0.2.3", 24, "eth1", secondary=True),
        AddressRecord("198.51.100.2", 24, "eth0", secondary=True),
        AddressRecord("192.0.2.4", 25, "eth0", secondary=True),
        AddressRecord("192.0.2.5", 24, "eth0"),
    ]
    assert dependents(first, [first, second, *others]) == [second]
    assert dependents(second, [first, second]) == []
    assert dependents(AddressRecord("2001:db8::10", 64, "eth0"), [first, second]) == []


async def test_the_fake_keeps_a_history_and_fails_when_told() -> None:
    book = FakeAddressBook([InterfaceRecord("eth0", 2, "02:00:00:00:00:01", up=True, mtu=1500)])
    record = AddressRecord("192.0.2.10", 24, "eth0")
    book.fail_next = KernelRefusedError("no")
    with pytest.raises(KernelRefusedError):
        await book.add(record)
    assert book.records == []
    await book.add(record)
    await book.remove(record)
    assert book.history == [("add", record), ("remove", record)]
    book.close()
    assert book.closed
