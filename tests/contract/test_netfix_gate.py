"""The contract of `Gate`, over nf_tables and the fake."""

from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from netfix import nft
from netfix.errors import GateAlteredError, InvalidAddressError, UsageError
from netfix.gate import CLOSED, OPEN, STATES, FakeGate, Gate, GateState, NftGate, holding, releasing
from netfix.netlink import NETLINK_NETFILTER, NetlinkSocket
from tests.contract.netfix_segment import SERVICE, SERVICE6, Namespace

MakeGate = Callable[[str], Gate]
EVERY_STATE = {**STATES, "holding-queue": holding(4711), "releasing": releasing(4711), "other-queue": holding(4712)}


@pytest.fixture
def host() -> Iterator[Namespace]:
    with Namespace() as namespace:
        yield namespace


@pytest.fixture(params=["nft", "fake"])
async def make_gate(request: pytest.FixtureRequest, host: Namespace) -> AsyncIterator[MakeGate]:
    """Gates of one host, by migration id; made before the test, because only there the namespace is the right one."""
    gates: dict[str, Gate] = {}
    kernel: dict[str, GateState] = {}
    addresses = [SERVICE, SERVICE6]
    for name in ("one", "two"):
        if request.param == "nft":
            gates[name] = await host.call(lambda name=name: NftGate(name, addresses))  # type: ignore[misc]
        else:
            gates[name] = FakeGate(name, addresses, kernel)
    yield gates.__getitem__
    for gate in gates.values():
        gate.close()


async def test_there_is_no_gate_at_first(make_gate: MakeGate) -> None:
    assert await make_gate("one").state() is None


@pytest.mark.parametrize("before", [None, *EVERY_STATE.values()], ids=["none", *EVERY_STATE])
@pytest.mark.parametrize("after", EVERY_STATE.values(), ids=list(EVERY_STATE))
async def test_every_state_follows_every_state(make_gate: MakeGate, before: GateState | None, after: GateState) -> None:
    gate = make_gate("one")
    if before is not None:
        await gate.set(before)
    await gate.set(after)
    assert await gate.state() == after


async def test_setting_a_state_twice_changes_nothing(make_gate: MakeGate) -> None:
    gate = make_gate("one")
    await gate.set(CLOSED)
    await gate.set(CLOSED)
    assert await gate.state() == CLOSED


async def test_removal_is_idempotent_and_can_be_followed_by_a_new_gate(make_gate: MakeGate) -> None:
    gate = make_gate("one")
    await gate.remove()
    await gate.set(CLOSED)
    await gate.remove()
    await gate.remove()
    assert await gate.state() is None
    await gate.set(OPEN)
    assert await gate.state() == OPEN


async def test_gates_of_two_migrations_do_not_meet(make_gate: MakeGate) -> None:
    one, two = make_gate("one"), make_gate("two")
    await one.set(CLOSED)
    assert await two.state() is None
    await two.set(OPEN)
    await two.remove()
    assert await one.state() == CLOSED


async def test_closing_the_object_leaves_the_gate(make_gate: MakeGate) -> None:
    await make_gate("one").set(CLOSED)
    make_gate("one").close()
    make_gate("one").close()


@pytest.mark.parametrize("kind", [NftGate, FakeGate])
def test_bad_names_and_addresses_are_refused(kind: type[NftGate] | type[FakeGate]) -> None:
    for name in ("", "a b", "x" * 65, "-a", "a/b", "a;drop"):
        with pytest.raises(UsageError, match="migration id"):
            kind(name, [SERVICE])
    with pytest.raises(UsageError, match="at least one address"):
        kind("one", [])
    with pytest.raises(InvalidAddressError):
        kind("one", ["nonsense"])


async def test_rules_that_are_not_ours_are_an_error_until_the_state_is_set_again(host: Namespace) -> None:
    gate = await host.call(lambda: NftGate("one", [SERVICE]))

    def meddle() -> None:
        with NetlinkSocket(NETLINK_NETFILTER, "test") as netlink:
            rule = nft.new_rule(nft.INET, "livemove-one", "output", nft.verdict(nft.ACCEPT), "stranger")
            again = nft.new_table(nft.INET, "livemove-one", nft.ACKNOWLEDGE)
            netlink.transact(nft.batch([rule, again]))

    try:
        await gate.set(CLOSED)
        await host.call(meddle)
        with pytest.raises(GateAlteredError):
            await gate.state()
        await gate.set(CLOSED)
        assert await gate.state() == CLOSED
    finally:
        gate.close()


async def test_half_a_gate_is_an_error(host: Namespace) -> None:
    gate = await host.call(lambda: NftGate("one", [SERVICE]))

    def halve() -> None:
        with NetlinkSocket(NETLINK_NETFILTER, "test") as netlink:
            netlink.transact(nft.batch([nft.delete_table(nft.ARP, "livemove-one", nft.ACKNOWLEDGE)]))

    try:
        await gate.set(OPEN)
        await host.call(halve)
        with pytest.raises(GateAlteredError):
            await gate.state()
        await gate.remove()
        assert await gate.state() is None
    finally:
        gate.close()
