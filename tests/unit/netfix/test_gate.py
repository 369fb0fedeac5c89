"""The rules of a gate as data, and the fake. What they do to packets: tests/contract/test_netfix_gate_network.py."""

import sys
from collections import Counter

import pytest

from netfix import nft
from netfix.errors import KernelRefusedError, UsageError
from netfix.gate import (
    CLOSED,
    FREEZING,
    HOLDING,
    OPEN,
    SILENT,
    STATES,
    FakeGate,
    GateState,
    holding,
    releasing,
    state_name,
    table_name,
)
from netfix.gate_rules import Address, Queue, ruleset
from netfix.unicast import parse_address

A, A6 = parse_address("192.0.2.10"), parse_address("2001:db8::10")


def _shape(state: GateState, *addresses: Address) -> Counter[tuple[str, str, str]]:
    queue = None if state.queue is None else Queue(state.queue, nft.TARGET)
    shown = {"answering": state.answering, "passing": state.passing, "datagrams": state.datagrams}
    rules = ruleset(addresses, queue=queue, **shown)
    return Counter((nft.FAMILY_NAMES[rule.family], rule.chain, rule.comment) for rule in rules)


def test_an_open_gate_has_no_rules() -> None:
    assert ruleset([A, A6], answering=True, passing=True) == []


def test_ipv4_is_silenced_in_arp_alone() -> None:
    assert _shape(SILENT, A) == {
        ("arp", "input", "silent 192.0.2.10"): 1,  # requests for it
        ("arp", "output", "silent 192.0.2.10"): 1,  # whatever names it as the sender
    }


def test_ipv6_is_silenced_in_neighbour_discovery() -> None:
    assert _shape(SILENT, A6) == {
        ("inet", "prerouting", "silent 2001:db8::10"): 1,  # solicitations for it
        ("inet", "output", "silent 2001:db8::10"): 2,  # advertisements of it, and all discovery from it
    }


def test_a_holding_gate_shuts_three_hooks_and_says_nothing_of_arp() -> None:
    assert _shape(HOLDING, A) == {
        ("inet", chain, "shut 192.0.2.10"): 1 for chain in ("prerouting", "output", "postrouting")
    }


def test_a_closed_gate_is_a_silent_one_and_a_holding_one() -> None:
    assert _shape(CLOSED, A, A6) == _shape(SILENT, A, A6) + _shape(HOLDING, A, A6)


def test_a_freezing_gate_is_a_closed_one_that_lets_datagrams_out() -> None:
    out = Counter(
        {("inet", chain, f"datagrams {address}"): 1 for chain in ("output", "postrouting") for address in (A, A6)}
    )
    assert _shape(FREEZING, A, A6) == _shape(CLOSED, A, A6) + out
    for chain in ("output", "postrouting"):
        comments = [r.comment for r in ruleset([A], answering=False, passing=False, datagrams=True) if r.chain == chain]
        assert [c for c in comments if c != "silent 192.0.2.10"] == ["datagrams 192.0.2.10", "shut 192.0.2.10"]


def test_neighbour_discovery_is_silenced_before_it_is_let_by_and_let_by_before_the_address_is_shut() -> None:
    for chain in ("prerouting", "output"):
        words = [
            rule.comment.split(" ")[0]
            for rule in ruleset([A6, A], answering=False, passing=False)
            if rule.chain == chain
        ]
        ipv6 = [word for word in words if word in ("silent", "neighbour", "shut")]
        assert ipv6 == sorted(ipv6, key=["silent", "neighbour", "shut"].index)


def test_a_queue_takes_the_place_of_the_inbound_drop() -> None:
    shut = _shape(HOLDING, A, A6)
    queued = Counter({("inet", "prerouting", f"queue {address} 7"): 1 for address in (A, A6)})
    inbound = Counter({("inet", "prerouting", f"shut {address}"): 1 for address in (A, A6)})
    assert _shape(holding(7), A, A6) == shut - inbound + queued
    let_by = Counter({("inet", chain, "neighbour discovery"): 1 for chain in ("prerouting", "output", "postrouting")})
    unknown = Counter({("inet", "output", f"unknown {address}"): 1 for address in (A, A6)})
    assert _shape(releasing(7), A, A6) == queued + let_by + unknown


def test_both_forms_of_a_queue_name_its_number() -> None:
    for form in (nft.QUEUE, nft.TARGET):
        message = nft.new_rule(nft.INET, "t", "c", nft.to_queue(0x1234, form), "x")
        number = b"\x12\x34" if form == nft.QUEUE else (0x1234).to_bytes(2, sys.byteorder) + b"\x01\x00"
        assert form.encode() in message
        assert number in message


def test_states_with_a_queue() -> None:
    assert GateState(True, False) == HOLDING == holding(None)
    assert releasing(None) == OPEN
    assert [state_name(state) for state in (holding(7), releasing(7))] == ["holding", "releasing"]
    assert state_name(GateState(False, False, 7)) == "closed"


def test_states_have_names() -> None:
    assert {name: state_name(state) for name, state in STATES.items()} == {name: name for name in STATES}
    assert len(set(STATES.values())) == 5


def test_table_names() -> None:
    assert table_name("m-1.a_B") == "livemove-m-1.a_B"
    with pytest.raises(UsageError):
        table_name("no spaces")


async def test_the_fake_remembers_and_fails_when_told() -> None:
    kernel: dict[str, GateState] = {}
    gate = FakeGate("one", ["192.0.2.10"], kernel)
    await gate.set(CLOSED)
    gate.fail_next = KernelRefusedError("no")
    with pytest.raises(KernelRefusedError):
        await gate.set(OPEN)
    assert await gate.state() == CLOSED
    assert await FakeGate("one", ["192.0.2.10"], kernel).state() == CLOSED
    await gate.remove()
    assert gate.history == [CLOSED, None]
    gate.close()
    assert gate.closed
