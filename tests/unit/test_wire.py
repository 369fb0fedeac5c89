"""Messages to plain data and back: every type, and every way in which data can be wrong."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import protocol
from coordinator.agent import messages
from coordinator.errors import ProtocolError
from coordinator.events import Event
from coordinator.protocol import REQUESTS, Endpoint, HalfResult, Recover
from coordinator.wire import decode, encode

MESSAGES: list[type] = sorted(
    {
        kind
        for module in (protocol, messages)
        for kind in vars(module).values()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
    }
    | {Event},
    key=lambda kind: kind.__name__,
)


def values(kind: Any) -> st.SearchStrategy[Any]:  # noqa: PLR0911
    """Values of a type as messages have them."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{f.name: values(hints[f.name]) for f in dataclasses.fields(kind)})
    if origin in (typing.Union, types.UnionType):
        return st.one_of([st.none() if each is type(None) else values(each) for each in arguments])
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(st.text(max_size=4), values(arguments[1]), max_size=2)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return st.sampled_from(kind)
    plain: dict[type, st.SearchStrategy[Any]] = {
        str: st.text(max_size=8),
        int: st.integers(),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        bytes: st.binary(max_size=8),
    }
    return plain[kind]


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_message_survives_the_wire(kind: type) -> None:
    @given(values(kind))
    def survives(message: object) -> None:
        assert decode(kind, json.loads(json.dumps(encode(message)))) == message

    survives()


def test_every_request_is_known_and_names_its_reply() -> None:
    for name, kind in REQUESTS.items():
        assert name == kind.__name__
        assert dataclasses.is_dataclass(kind.reply)


GOOD: dict[str, Any] = {"id": "m", "verdict": "unknown", "wait_s": 1.5}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"id": 7}, "Recover.id"),
        ({"id": None}, "Recover.id"),
        ({"verdict": "perhaps"}, "Recover.verdict"),
        ({"wait_s": "1"}, "Recover.wait_s"),
        ({"wait_s": True}, "Recover.wait_s"),
        ({"patience": 1}, "patience"),
    ],
)
def test_a_wrong_or_unknown_field_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ProtocolError, match=named):
        decode(Recover, {**GOOD, **change})


@pytest.mark.parametrize("missing", GOOD)
def test_a_missing_field_is_named(missing: str) -> None:
    with pytest.raises(ProtocolError, match=missing):
        decode(Recover, {name: value for name, value in GOOD.items() if name != missing})


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("phase", "NOWHERE", "HalfResult.phase"),
        ("phases", {}, "HalfResult.phases"),
        ("phases", [{"name": "FROZEN", "start_ms": 0, "ms": "x"}], r"HalfResult.phases\[0\].ms"),
        ("error", {"code": 1}, "HalfResult.error.code"),
        ("error", [], "HalfResult.error"),
        ("root_pid", 1.0, "HalfResult.root_pid"),
        ("root_pid", False, "HalfResult.root_pid"),
    ],
)
def test_a_wrong_field_deep_inside_is_named(field: str, value: object, named: str) -> None:
    with pytest.raises(ProtocolError, match=named):
        decode(HalfResult, {"outcome": "moved", "phase": "RELEASED", field: value})


@pytest.mark.parametrize("data", [None, [], "text", 1])
def test_what_is_no_object_is_refused(data: object) -> None:
    with pytest.raises(ProtocolError, match="Endpoint"):
        decode(Endpoint, data)


def test_bytes_are_base64() -> None:
    frame = b"\x00\xff"
    move = protocol.AddressMove(
        address="192.0.2.1", prefixlen=24, announce_at_destination=(frame,), announce_at_source=()
    )
    data = encode(move)
    assert data["announce_at_destination"] == ["AP8="]
    with pytest.raises(ProtocolError, match=r"announce_at_source\[0\]: not base64"):
        decode(protocol.AddressMove, {**data, "announce_at_source": ["§"]})
