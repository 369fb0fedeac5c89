"""One section of a TOML file, read key by key: a wrong value becomes a problem, never an exception.

``Section``'s readers return ``None`` (or nothing) where a value is missing or wrong, and note why. What they noted
is raised once, by ``Problems.raise_for``, when the whole file has been looked at.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

from coordinator.errors import ConfigError

T = TypeVar("T")
Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface

_HOSTNAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?(\.[A-Za-z0-9_-]{1,63})*\.?")
_TARGET = re.compile(
    r"(?:(?P<user>[^@\s:\[\]]+)@)?(?:\[(?P<v6>[^\]]+)\]|(?P<plain>[^@:\[\]]+))(?::(?P<port>[0-9]{1,5}))?"
)
_TYPE_NAMES = {
    dict: "a section",
    list: "a list",
    str: "a text",
    bool: "a truth value",
    int: "a number",
    float: "a number",
}


class Problems:
    """What is wrong with a file, in the order it was found."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def add(self, key: str, what: str) -> None:
        """Note a problem: ``key`` is the dotted path, ``what`` says what is wrong and what to write."""
        self._found.append(f"{key}: {what}")

    def raise_for(self, path: Path) -> None:
        """Raise one ``ConfigError`` with everything noted; nothing if nothing was."""
        if len(self._found) == 1:
            raise ConfigError(f"{path}: {self._found[0]}")
        if self._found:
            raise ConfigError("\n  ".join([f"{path}: {len(self._found)} problems", *self._found]))


class Section:
    """A table of the file at a dotted path. ``known`` are the keys it may have; ``None``: names chosen by the user."""

    def __init__(self, problems: Problems, path: str, table: dict[str, object], known: tuple[str, ...] | None) -> None:
        self.table = table
        self._path = path
        self._problems = problems
        for key in table if known is not None else ():
            if key not in (known or ()):
                self.problem(key, f"unknown key{did_you_mean(key, known or ())}; known here: {', '.join(known or ())}")

    def problem(self, key: str, what: str) -> None:
        """Note a problem of one key of this section."""
        shown = key if re.fullmatch(r"[\w\[\]-]+", key) else repr(key)
        self._problems.add(f"{self._path}.{shown}" if self._path else shown, what)

    def section(self, key: str, known: tuple[str, ...] | None) -> Section:
        """The section below ``key``; an empty one where there is none, or something else."""
        value = self.table.get(key, {})
        path = f"{self._path}.{key}" if self._path else key
        if not isinstance(value, dict):
            self.problem(key, f"must be a section, not {_type_name(value)}; write [{path}] above its keys")
            value = {}
        return Section(self._problems, path, value, known)

    def sections(self, key: str, known: tuple[str, ...]) -> tuple[Section, ...]:
        """The sections of the list ``key``, each of which begins with ``[[…]]``; none where there is no such key."""
        value = self.table.get(key, [])
        path = f"{self._path}.{key}"
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            self.problem(key, f"must be a list of sections; write [[{path}]] above the keys of each")
            return ()
        return tuple(Section(self._problems, f"{path}[{n}]", each, known) for n, each in enumerate(value))

    def text(
        self, key: str, example: str, *, required: bool = True, pattern: re.Pattern[str] | None = None
    ) -> str | None:
        """A text that is not empty and, with ``pattern``, matches it."""
        if key not in self.table:
            if required:
                self.problem(key, f"missing; write {example}")
            return None
        value = self.table[key]
        if not isinstance(value, str):
            self.problem(key, f"must be a text, not {_type_name(value)}; write {example}")
        elif not value.strip() or "\0" in value or (pattern is not None and not pattern.fullmatch(value)):
            self.problem(key, f"{value!r} will not do; write for example {example}")
        else:
            return value
        return None

    def absolute(self, key: str, example: str, *, required: bool = True) -> str | None:
        """A path on a host, which has to be absolute."""
        value = self.text(key, example, required=required)
        if value is not None and not value.startswith("/"):
            self.problem(key, f"{value!r} is not an absolute path on the host; write for example {example}")
            return None
        return value

    def texts(self, key: str, example: str) -> tuple[str, ...]:
        """A list of at least one text."""
        if key not in self.table:
            self.problem(key, f"missing; write {example}")
            return ()
        value = self.table[key]
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            self.problem(key, f"must be a list of at least one text; write {example}")
            return ()
        return tuple(value)

    def whole(self, key: str, example: str, *, least: int, most: int) -> int | None:
        """A whole number within bounds; ``None`` without a problem where the key is absent."""
        value = self.table.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.problem(key, f"must be a whole number from {least} to {most}; write {example}")
            return None
        return value

    def seconds(self, key: str, example: str) -> float | None:
        """A time in seconds above 0; ``None`` without a problem where the key is absent."""
        return self.number(key, example, unit=" of seconds")

    def number(self, key: str, example: str, *, unit: str = "") -> float | None:
        """A number above 0; ``None`` without a problem where the key is absent."""
        value = self.table.get(key)
        if value is None:
            return None
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value <= 86_400
            or math.isnan(value)
        ):
            self.problem(key, f"must be a number{unit} above 0, at most 86400; write {example}")
            return None
        return float(value)

    def choice(self, key: str, choices: tuple[str, ...], usual: str) -> str:
        """One of a few words; ``usual`` where the key is absent or wrong."""
        value = self.table.get(key, usual)
        if value in choices:
            return str(value)
        known = ", ".join(f'"{each}"' for each in choices)
        self.problem(key, f"{value!r} is none of {known}{did_you_mean(str(value), choices)}")
        return usual

    def parsed(self, key: str, value: str | None, parse: Callable[[str], T]) -> T | None:
        """``parse(value)``; its ``ValueError`` becomes a problem of the key."""
        if value is None:
            return None
        try:
            return parse(value)
        except ValueError as error:
            self.problem(key, str(error))
            return None


@dataclass(frozen=True, slots=True)
class SshTarget:
    """A parsed ``[user@]address[:port]``."""

    user: str
    address: str
    port: int


def ssh_target(text: str) -> SshTarget:
    """Parse ``[user@]address[:port]`` or ``[user@][v6]:port``; a bare IPv6 address is one too. Or ``ValueError``."""
    expected = f'{text!r} is no ssh target; write "[user@]address[:port]", with an IPv6 address and port as "[v6]:port"'
    user, _, address = text.rpartition("@")
    if address.count(":") > 1 and not address.startswith("["):
        text = f"{user}@[{address}]" if user else f"[{address}]"
    match = _TARGET.fullmatch(text)
    if match is None:
        raise ValueError(expected)
    port = int(match["port"] or 22)
    if not 0 < port < 65536:
        raise ValueError(f"{text!r}: {port} is no TCP port; write one from 1 to 65535")
    try:
        address = str(ipaddress.IPv6Address(match["v6"])) if match["v6"] else address_of(match["plain"])
    except ValueError as error:
        raise ValueError(expected) from error
    return SshTarget(match["user"] or "root", address, port)


def address_of(text: str) -> str:
    """An IP address, normalised, or a host name; ``ValueError`` for anything else."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        if _HOSTNAME.fullmatch(text) and not re.fullmatch(r"[0-9.]+", text):
            return text
        raise ValueError(f'{text!r} is no IP address and no host name; write for example "192.0.2.11"') from None


def cidr(text: str) -> Interface:
    """A service address with its prefix length; ``ValueError`` for what no host can have and another can take over."""
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError:
        raise ValueError(f'{text!r} is no address in CIDR form; write for example "192.0.2.200/24"') from None
    if "/" not in text:
        usual = 24 if interface.version == 4 else 64
        raise ValueError(f'{text!r} has no prefix length; write for example "{text}/{usual}"')
    address, network = interface.ip, interface.network
    if address.is_loopback or address.is_multicast or address.is_unspecified or address.is_link_local:
        raise ValueError(f"{text!r} cannot move to another host; write an address of the hosts' common network")
    edges = (network.network_address, network.broadcast_address)
    if interface.version == 4 and network.prefixlen < 31 and address in edges:
        raise ValueError(f"{text!r} is the network's own or broadcast address; write an address inside {network}")
    return interface


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """``'; did you mean …?'`` with the nearest known word, or nothing."""
    near = get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _type_name(value: object) -> str:
    return _TYPE_NAMES.get(type(value), type(value).__name__)
