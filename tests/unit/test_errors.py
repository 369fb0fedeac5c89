"""Errors keep their type, their words and their exit status across the wire."""

from __future__ import annotations

import json

import pytest

from coordinator.errors import AgentFailed, ExitCode, LivemoveError

KINDS = sorted(LivemoveError.registry.values(), key=lambda kind: kind.code)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.code)
def test_the_type_survives_the_wire(kind: type[LivemoveError]) -> None:
    sent = kind("what and where", "what to do")
    found = LivemoveError.from_wire(json.loads(json.dumps(sent.to_wire())))
    assert type(found) is kind
    assert (found.message, found.hint, found.exit_code) == ("what and where", "what to do", kind.exit_code)
    assert LivemoveError.from_wire(kind("x").to_wire()).hint == kind.default_hint


def test_an_unknown_code_is_a_failed_agent_with_the_words_of_the_other_side() -> None:
    found = LivemoveError.from_wire({"code": "FROM_THE_FUTURE", "message": "it rains", "hint": "umbrella"})
    assert type(found) is AgentFailed
    assert (found.message, found.hint) == ("it rains", "umbrella")


@pytest.mark.parametrize("data", [{}, {"code": None}, {"code": 7, "message": 8}])
def test_what_is_no_error_is_one_all_the_same(data: dict[str, object]) -> None:
    assert type(LivemoveError.from_wire(data)) is AgentFailed


def test_a_code_is_used_once() -> None:
    with pytest.raises(TypeError, match="CONFIG is used twice"):
        type("Another", (LivemoveError,), {"code": "CONFIG"})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.code)
def test_every_error_says_where_the_service_is_and_what_to_do(kind: type[LivemoveError]) -> None:
    assert isinstance(kind.exit_code, ExitCode)
    assert kind.default_hint
    assert kind.__doc__
