"""Finds what would cut a service off and was left by others: CRIU's network locks, and gates of other migrations.

CRIU locks a connection by rules and takes them away at the end of a dump or restore *that it finishes on this host*.
After a dump they stay on the source for ever, and a connection that comes back there later is silently cut. Its forms
(CRIU's criu/netfilter.c, criu/net.c): the table `inet CRIU-<pid>` (`--network-lock nftables`), a chain CRIU in the
iptables filter table (a container's own network namespace), or rules in INPUT and OUTPUT that drop what does not bear
the mark 0xC114 (connections in the host's namespace). Only what nf_tables lists is seen: rules of iptables-legacy are
not.
"""

import errno
import re
import struct
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

from . import nft
from .errors import UsageError, from_errno
from .gate import TABLE_PREFIX, table_name
from .hooks import Hooks
from .netlink import NETLINK_NETFILTER, NetlinkSocket, Refusal

_CRIU_TABLE = re.compile(r"CRIU(-.*)?")
_CRIU_CHAIN = "CRIU"
_CRIU_MARK = struct.pack("=I", 0xC114)
_FILTER_FAMILIES = (nft.IPV4, nft.IPV6, nft.INET)


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something found. `kind`: `criu-table`, `criu-chain`, `criu-rule` or `gate`; `family` as nft names it.

    `chain` is empty where the whole table is meant; `detail` is a sentence for people, `hint` a command that removes
    it.
    """

    kind: str
    family: str
    table: str
    chain: str
    detail: str
    hint: str


class LeftoverFinder(Protocol):
    """What was left on one host."""

    async def find(self, except_for: str | None = None) -> list[Leftover]:
        """All leftovers, without the gate of the migration `except_for`. Changes nothing. Raises NetfixError."""


def judge(
    tables: Iterable[nft.Table], chains: Iterable[nft.Chain], rules: Iterable[nft.Rule], except_for: str | None
) -> list[Leftover]:
    """What among these is a leftover. Pure."""
    own = table_name(except_for) if except_for else ""
    found = []
    for table in tables:
        family = nft.FAMILY_NAMES.get(table.family, str(table.family))
        remove = f"nft delete table {family} {table.name}"
        if table.name.startswith(TABLE_PREFIX) and table.name != own:
            ident = table.name.removeprefix(TABLE_PREFIX)
            detail = f"gate of the migration {ident}, in family {family}"
            hint = f"livemove recover {ident}; or, if that migration is over, netfix gate open {ident}"
            found.append(Leftover("gate", family, table.name, "", detail, hint))
        elif _CRIU_TABLE.fullmatch(table.name):
            detail = "network lock of a CRIU dump: connections named in it are cut off"
            found.append(Leftover("criu-table", family, table.name, "", detail, remove))
    for chain in chains:
        if chain.name == _CRIU_CHAIN and chain.family in _FILTER_FAMILIES and not _CRIU_TABLE.fullmatch(chain.table):
            family = nft.FAMILY_NAMES[chain.family]
            tool = "ip6tables" if chain.family == nft.IPV6 else "iptables"
            hint = f"{tool} -D INPUT -j CRIU; {tool} -D OUTPUT -j CRIU; {tool} -F CRIU; {tool} -X CRIU"
            detail = "network lock of a CRIU dump: all traffic without CRIU's mark is dropped"
            found.append(Leftover("criu-chain", family, chain.table, chain.name, detail, hint))
    seen: dict[tuple[int, str, str], int] = {}
    for rule in rules:
        place = (rule.family, rule.table, rule.chain)
        in_lock = rule.chain == _CRIU_CHAIN or _CRIU_TABLE.fullmatch(rule.table)
        if rule.family in _FILTER_FAMILIES and not in_lock and _CRIU_MARK in rule.expressions:
            seen[place] = seen.get(place, 0) + 1
    for (number, name, chain_name), count in seen.items():
        family = nft.FAMILY_NAMES[number]
        detail = f"{count} rule(s) with CRIU's mark 0xc114: locks of single connections, left by a dump"
        hint = f"nft -a list chain {family} {name} {chain_name}, then nft delete rule … handle N for each of them"
        found.append(Leftover("criu-rule", family, name, chain_name, detail, hint))
    return found


class NftLeftoverFinder:
    """Leftovers in nf_tables, in the network namespace of the calling thread. See `LeftoverFinder`."""

    async def find(self, except_for: str | None = None) -> list[Leftover]:
        with NetlinkSocket(NETLINK_NETFILTER, "reading nftables") as netlink:
            try:
                tables = nft.tables(netlink)
                chains = nft.chains(netlink) if tables else []
                rules = nft.rules(netlink) if tables else []
            except Refusal as refusal:
                raise from_errno(refusal.number, "reading nftables", refusal.detail) from refusal
        return judge(tables, chains, rules, except_for)


async def find_leftovers(except_for: str | None = None) -> list[Leftover]:
    """What was left on this host, without the gate of the migration `except_for`. Raises NetfixError."""
    return await NftLeftoverFinder().find(except_for)


async def remove_leftover(leftover: Leftover) -> None:
    """Remove what CRIU left, in one transaction; fine if it is gone. A gate is not removed here (`remove_gate`).

    Raises NetfixError.
    """
    doing = f"removing {leftover.kind} {leftover.table} {leftover.chain}".rstrip()
    with NetlinkSocket(NETLINK_NETFILTER, doing) as netlink, closing(Hooks()) as hooks:
        try:
            messages = _removal(leftover, nft.tables(netlink), nft.chains(netlink), nft.rules(netlink))
            if messages:
                async with hooks.alone():
                    netlink.transact(nft.batch(messages))
        except Refusal as refusal:
            if refusal.number != errno.ENOENT:
                raise from_errno(refusal.number, doing, refusal.detail) from refusal


def _removal(
    leftover: Leftover, tables: Iterable[nft.Table], chains: Iterable[nft.Chain], rules: Iterable[nft.Rule]
) -> list[bytes]:
    family = next(number for number, name in nft.FAMILY_NAMES.items() if name == leftover.family)
    here = [rule for rule in rules if (rule.family, rule.table) == (family, leftover.table)]
    if leftover.kind == "criu-table":
        there = nft.Table(family, leftover.table) in list(tables)
        return [nft.delete_table(family, leftover.table, nft.ACKNOWLEDGE)] if there else []
    if leftover.kind == "criu-rule":
        marked = [rule for rule in here if rule.chain == leftover.chain and _CRIU_MARK in rule.expressions]
        # One acknowledgement for all: thousands would not fit into the socket. An error is answered in any case.
        return [nft.delete_rule(rule, nft.ACKNOWLEDGE if rule is marked[-1] else 0) for rule in marked]
    if leftover.kind == "criu-chain":
        chain = nft.Chain(family, leftover.table, leftover.chain)
        if chain not in list(chains):
            return []
        jump = leftover.chain.encode() + b"\0"
        doomed = [rule for rule in here if rule.chain == leftover.chain or jump in rule.expressions]
        return [*(nft.delete_rule(rule) for rule in doomed), nft.delete_chain(chain, nft.ACKNOWLEDGE)]
    raise UsageError(f"{leftover.kind} is not CRIU's")


class FakeLeftoverFinder:
    """Leftovers in memory, for tests: `leftovers` is what there is."""

    def __init__(self, leftovers: Iterable[Leftover] = ()) -> None:
        self.leftovers = list(leftovers)

    async def find(self, except_for: str | None = None) -> list[Leftover]:
        own = table_name(except_for) if except_for else ""
        return [leftover for leftover in self.leftovers if leftover.table != own]
