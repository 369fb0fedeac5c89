"""A sweep of a real host: rules, tables and addresses that were left, in a network namespace."""

from pathlib import Path

from netfix import nft
from netfix.address import AddressRecord, NetlinkAddressBook
from netfix.gate import CLOSED, NftGate, find_gates
from netfix.leftovers import find_leftovers
from netfix.netlink import NETLINK_NETFILTER, NetlinkSocket
from netfix.sweep import Remnant, remnants, remove
from tests.contract.netfix_segment import SERVICE, SERVICE6, Segment


def _what_criu_leaves() -> None:
    mark = nft.meta_is(3, (0xC114).to_bytes(4, "little"))
    with NetlinkSocket(NETLINK_NETFILTER, "test") as netlink:
        netlink.transact(
            nft.batch(
                [
                    nft.new_table(nft.INET, "CRIU-4711"),
                    nft.new_base_chain(nft.INET, "CRIU-4711", "input", 1, 0),
                    nft.new_table(nft.IPV4, "filter"),
                    nft.new_base_chain(nft.IPV4, "filter", "INPUT", 1, 0),
                    nft.new_base_chain(nft.IPV4, "filter", "CRIU", 1, 0),
                    nft.new_rule(nft.IPV4, "filter", "CRIU", nft.verdict(nft.DROP), ""),
                    nft.new_rule(nft.IPV4, "filter", "INPUT", [*mark, *nft.verdict(nft.DROP)], ""),
                    nft.new_rule(nft.IPV4, "filter", "INPUT", nft.verdict(nft.ACCEPT), "not CRIU's"),
                    nft.new_table(nft.INET, "CRIU-4711", nft.ACKNOWLEDGE),
                ]
            )
        )


def _what_criu_leaves_of_many_connections() -> None:
    """Two rules a connection, as CRIU's iptables lock makes them."""
    mark = nft.meta_is(3, (0xC114).to_bytes(4, "little"))
    rule = nft.new_rule(nft.IPV4, "filter", "INPUT", [*mark, *nft.verdict(nft.DROP)], "")
    head = [nft.new_table(nft.IPV4, "filter"), nft.new_base_chain(nft.IPV4, "filter", "INPUT", 1, 0)]
    tail = nft.new_table(nft.IPV4, "filter", nft.ACKNOWLEDGE)
    with NetlinkSocket(NETLINK_NETFILTER, "test") as netlink:
        for messages in (head, *([[rule] * 250] * 10)):
            netlink.transact(nft.batch([*messages, tail]))


def _rules() -> list[str]:
    with NetlinkSocket(NETLINK_NETFILTER, "test") as netlink:
        return [rule.comment for rule in nft.rules(netlink)]


async def _sweep(cable: Segment, elsewhere: set[str], state_dir: Path) -> list[Remnant]:
    book = await cable.host.call(NetlinkAddressBook)

    async def answered(record: AddressRecord) -> bool:
        return record.address in elsewhere

    try:
        found = await cable.host.run(remnants(book, answered, state_dir=state_dir, proc=state_dir))
        for remnant in found:
            if not remnant.spared:
                await cable.host.run(remove(remnant, book))
                await cable.host.run(remove(remnant, book))
        return found
    finally:
        book.close()


async def _has(cable: Segment, address: str) -> bool:
    book = await cable.host.call(NetlinkAddressBook)
    try:
        return bool(await book.find(address))
    finally:
        book.close()


async def test_what_criu_left_goes_and_other_rules_stay(cable: Segment, tmp_path: Path) -> None:
    await cable.host.call(_what_criu_leaves)
    found = await _sweep(cable, set(), tmp_path)
    assert {one.kind for one in found} == {"criu-table", "criu-chain", "criu-rule"}
    assert await cable.host.run(find_leftovers()) == []
    assert await cable.host.call(_rules) == ["not CRIU's"]


async def test_the_rules_of_thousands_of_connections_go(cable: Segment, tmp_path: Path) -> None:
    await cable.host.call(_what_criu_leaves_of_many_connections)
    await _sweep(cable, set(), tmp_path)
    assert await cable.host.call(_rules) == []


async def test_a_gate_goes_and_with_it_the_address_that_is_elsewhere_now(cable: Segment, tmp_path: Path) -> None:
    gate = await cable.host.call(lambda: NftGate("old", [SERVICE, SERVICE6]))
    await gate.set(CLOSED)
    gate.close()
    (remnant,) = await _sweep(cable, {SERVICE}, tmp_path)
    assert [record.address for record in remnant.addresses] == [SERVICE]
    assert await cable.host.run(find_gates()) == []
    assert not await _has(cable, SERVICE)
    assert await _has(cable, SERVICE6), "nobody else has it: it belongs here"


async def test_a_gate_with_a_journal_stays(cable: Segment, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    gate = await cable.host.call(lambda: NftGate("old", [SERVICE]))
    try:
        await gate.set(CLOSED)
        (remnant,) = await _sweep(cable, {SERVICE}, tmp_path)
        assert "livemove recover old" in remnant.spared
        assert remnant.addresses == ()
        assert await gate.state() == CLOSED
        assert await _has(cable, SERVICE)
    finally:
        gate.close()
