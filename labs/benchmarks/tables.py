"""What the benchmarks found, as tables for people. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from labs.benchmarks.measure import Row

MEGABYTE = 1 << 20


def number(value: Any, digits: int = 0) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in words:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def memory_table(cases: Sequence[Row]) -> Table:
    """Two lines a size: livemove and, below it, the plain migration of the same run."""
    headings: tuple[str, ...] = (
        "longest\ngap ms",
        "(min–max)",
        "freeze\nms",
        "total\nms",
        "sent÷\nused",
        "p99 ms\nbefore",
    )
    headings += ("p99 ms\ncopying", "CPU s\nsource", "CPU s\ndest.", "wrong\nbytes", "gap\nratio")
    table = _table("Medians", ("memory", "move"), headings)
    for case in cases:
        for kind, mode in (("livemove", case["mode"]), ("plain", "")):
            seen = case[kind]
            least, most = seen["spread"].get("longest_gap_ms") or (None, None)
            table.add_row(
                f"{case['memory_mb']} MB" if kind == "livemove" else "",
                f"{kind} {mode}".rstrip(),
                number(seen.get("longest_gap_ms")),
                f"{number(least)}–{number(most)}",
                number(seen.get("freeze_ms")),
                number(seen.get("total_ms")),
                number(seen.get("sent_per_used_memory"), 2),
                number(seen.get("p99_before_ms"), 2),
                number(seen.get("p99_copying_ms"), 2),
                number(seen.get("cpu_source_s"), 2),
                number(seen.get("cpu_destination_s"), 2),
                str(seen["wrong_bytes"]),
                number(case["gap_ratio"], 3) if kind == "livemove" else "",
            )
    return table


def memory_tables(cases: Sequence[Row]) -> Group:
    """What clients noticed, and where the freezes went."""
    return Group(memory_table(cases), "", freeze_table(cases))


def freeze_table(cases: Sequence[Row]) -> Table:
    """A line for each part of a freeze, a column a size. The two hosts' parts are at the same time."""
    sizes = [f"{case['memory_mb']} MB" for case in cases]
    table = _table("Where livemove's freeze goes, medians in ms", ("host", "part that ends"), sizes)
    for role in ("source", "destination"):
        for name in dict.fromkeys(name for case in cases for name in case["freeze_parts"][role]):
            table.add_row(role, name, *(number(case["freeze_parts"][role].get(name), 1) for case in cases))
    return table


def gap_table(hops: Sequence[Row]) -> Table:
    headings: tuple[str, ...] = ("freeze\nms", "longest\ngap ms", "gap −\nfreeze", "re-\nsent", "RST", "ICMP\nunreach.")
    headings += ("new con-\nnections", "re-\nfused", "slowest\nconnect ms")
    table = _table("What the clients saw", ("hop", "from"), headings)
    for place, hop in enumerate(hops, 1):
        table.add_row(
            str(place),
            hop["source"],
            number(hop["freeze_ms"], 1),
            number(hop["longest_gap_ms"], 1),
            number(hop["longest_gap_ms"] - hop["freeze_ms"], 1),
            *(str(hop[name]) for name in ("retransmissions", "rst", "icmp_unreachable", "connects", "refused")),
            number(hop["slowest_connect_ms"], 1),
        )
    return table


def connections_table(cases: Sequence[Row]) -> Table:
    headings = ("connections", "freeze ms", "longest gap ms", "re-sent", "lost", "wrong bytes")
    table = _table("Each connection checked before and after", ("lock",), headings)
    table.add_column("")
    for case in cases:
        table.add_row(
            case["lock"],
            str(case["connections"]),
            number(case["freeze_ms"], 1),
            number(case["longest_gap_ms"], 1),
            *(number(case[name]) for name in ("retransmissions", "lost", "wrong_bytes")),
            case.get("note", ""),
        )
    return table


def files_table(cases: Sequence[Row]) -> Table:
    headings = ("moves", "freeze ms", "of it files ms", "total ms", "first total ms")
    table = _table("Medians; the first move copies everything", ("files",), headings)
    for case in cases:
        numbers = (number(case[name], 1) for name in ("freeze_ms", "files_ms", "total_ms", "first_total_ms"))
        table.add_row(str(case["files"]), str(case["runs"]), *numbers)
    return table
