"""What counts as a leftover."""

import struct

from netfix import nft
from netfix.leftovers import judge

MARK = struct.pack("=I", 0xC114)


def test_an_ordinary_ruleset_has_none() -> None:
    tables = [nft.Table(nft.INET, "filter"), nft.Table(nft.IPV4, "nat"), nft.Table(nft.INET, "CRIUS")]
    chains = [nft.Chain(nft.IPV4, "filter", "INPUT"), nft.Chain(nft.IPV4, "filter", "criu")]
    rules = [nft.Rule(nft.IPV4, "filter", "INPUT", b"something else", "")]
    assert judge(tables, chains, rules, None) == []


def test_locks_of_criu_in_all_their_forms() -> None:
    tables = [nft.Table(nft.INET, "CRIU-12"), nft.Table(nft.IPV4, "filter")]
    chains = [nft.Chain(nft.INET, "CRIU-12", "CRIU"), nft.Chain(nft.IPV6, "filter", "CRIU")]
    rules = [
        nft.Rule(nft.INET, "CRIU-12", "CRIU", MARK, ""),
        nft.Rule(nft.IPV6, "filter", "CRIU", MARK, ""),
        nft.Rule(nft.IPV4, "filter", "INPUT", b"..." + MARK, ""),
        nft.Rule(nft.IPV4, "filter", "INPUT", MARK, ""),
    ]
    found = judge(tables, chains, rules, None)
    assert [(one.kind, one.family, one.table, one.chain) for one in found] == [
        ("criu-table", "inet", "CRIU-12", ""),
        ("criu-chain", "ip6", "filter", "CRIU"),
        ("criu-rule", "ip", "filter", "INPUT"),
    ]
    assert found[0].hint == "nft delete table inet CRIU-12"
    assert "ip6tables -F CRIU" in found[1].hint
    assert found[2].detail.startswith("2 rule(s)")


def test_gates_of_other_migrations() -> None:
    tables = [nft.Table(family, f"livemove-{name}") for name in ("a", "b") for family in (nft.INET, nft.ARP)]
    assert [(one.family, one.table) for one in judge(tables, [], [], "a")] == [
        ("inet", "livemove-b"),
        ("arp", "livemove-b"),
    ]
    assert len(judge(tables, [], [], None)) == 4
