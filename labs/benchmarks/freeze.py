"""Where a freeze has gone, part by part, as the journals of the two halves say it after a move."""

from __future__ import annotations

import json
from collections.abc import Sequence

from labs.benchmarks.measure import Row, median
from labs.lab import Lab
from labs.machines import Host

_JOURNALS = "/var/lib/livemove"
_ROLES = ("source", "destination")


def freeze_parts(lab: Lab, result: Row) -> Row:
    """The parts that each half has noted in milliseconds, in their order: {"source": {name: ms}, "destination": …}."""
    return {role: _noted(lab.host(result[role]), f"{_JOURNALS}/{result['id']}/{role}.jsonl") for role in _ROLES}


def _noted(host: Host, journal: str) -> Row:
    records = [json.loads(line) for line in host.read_file(journal).splitlines()]
    return {part["name"]: part["ms"] for each in records if each["kind"] == "freeze" for part in each["parts"]}


def median_parts(moves: Sequence[Row]) -> Row:
    """The median of each part over several moves."""
    return {
        role: {name: median(each[role].get(name) for each in moves) for name in (moves[0][role] if moves else ())}
        for role in _ROLES
    }
