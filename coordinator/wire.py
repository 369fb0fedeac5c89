"""Frozen dataclasses to plain JSON data and back, strictly.

The types on the dataclass are the schema: a missing field without default, an unknown field, or a value of another
type is a ``ProtocolError`` that names the field. Supported: ``str``, ``int``, ``float``, ``bool``, ``bytes`` (base64),
``None``, enums, ``Literal``, ``X | None``, ``tuple[X, ...]``, ``dict[str, X]`` and nested dataclasses.
"""

from __future__ import annotations

import base64
import dataclasses
import types
import typing
from enum import Enum
from functools import cache
from typing import Any, TypeVar

from coordinator.errors import ProtocolError

T = TypeVar("T")

_PLAIN = (str, int, bool)
"""What is the same in JSON."""


def encode(value: Any) -> Any:  # noqa: PLR0911 - a case for each kind
    """Return ``value`` as data that ``json.dumps`` accepts."""
    if type(value) in _PLAIN:
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, tuple | list | frozenset):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    return value


def decode(kind: type[T], data: Any) -> T:
    """Build a ``kind`` from plain data; raise ``ProtocolError`` where the data is not of that shape."""
    return typing.cast(T, _decode(kind, data, kind.__name__))


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _decode(kind: Any, data: Any, where: str) -> Any:  # noqa: PLR0911 - likewise
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, data, where)
    if origin in (typing.Union, types.UnionType):
        return _decode_optional(kind, data, where)
    if origin is typing.Literal:
        if data in typing.get_args(kind):
            return data
        raise ProtocolError(f"{where}: {data!r} is none of {typing.get_args(kind)}")
    if origin is tuple and isinstance(data, list):
        item = typing.get_args(kind)[0]
        if item in _PLAIN and all(type(value) is item for value in data):
            return tuple(data)  # thousands of them come in one message
        return tuple(_decode(item, value, f"{where}[{n}]") for n, value in enumerate(data))
    if origin is dict and isinstance(data, dict):
        item = typing.get_args(kind)[1]
        if item in _PLAIN and all(type(value) is item for value in data.values()):
            return data
        return {str(key): _decode(item, value, f"{where}.{key}") for key, value in data.items()}
    return _decode_scalar(kind, data, where)


def _decode_scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is bytes and isinstance(data, str):
        try:
            return base64.b64decode(data, validate=True)
        except ValueError as error:
            raise ProtocolError(f"{where}: not base64: {error}") from error
    if isinstance(kind, type) and issubclass(kind, Enum):
        try:
            return kind(data)
        except ValueError as error:
            raise ProtocolError(f"{where}: {data!r} is no {kind.__name__}") from error
    if kind is float and isinstance(data, int | float) and not isinstance(data, bool):
        return float(data)
    if kind in _PLAIN and type(data) is kind:
        return data
    raise ProtocolError(f"{where}: {data!r} is not of type {getattr(kind, '__name__', kind)}")


def _decode_optional(kind: Any, data: Any, where: str) -> Any:
    options = [option for option in typing.get_args(kind) if option is not type(None)]
    if data is None and len(options) < len(typing.get_args(kind)):
        return None
    if len(options) != 1:
        raise ProtocolError(f"{where}: only X | None is supported in a message")
    return _decode(options[0], data, where)


def _decode_dataclass(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ProtocolError(f"{where}: {data!r} is not an object")
    hints = _hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(set(data) - set(fields)):
        raise ProtocolError(f"{where}: unknown field {unknown[0]!r}")
    values = {name: _decode(hints[name], data[name], f"{where}.{name}") for name in fields if name in data}
    try:
        return kind(**values)
    except TypeError as error:
        raise ProtocolError(f"{where}: {error}") from error
