"""A game that people are playing moves: a server that talks UDP alone, and sends without being asked.

The large one, with three hosts and eight players, is labs/xonotic.
"""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from labs import limits
from labs.catalogue.teeworlds import SERVICE
from labs.lab import Lab
from labs.services import Outcome, Tour
from labs.steps import Steps

PACKAGES = "services"


def test_a_teeworlds_server_moves_there_and_back_and_every_question_is_answered(packaged_lab: Lab) -> None:
    limits.work_around(packaged_lab)
    said = StringIO()
    outcome = Outcome(SERVICE.name, "runc", SERVICE.needed)
    Tour(packaged_lab, hops=2, keep=False, steps=Steps(Console(file=said))).take(SERVICE, outcome)
    assert outcome.problems == [], said.getvalue()
    assert (outcome.hops, outcome.lost, outcome.wrong) == (2, 0, 0)
    assert outcome.connections == 6
    assert outcome.freeze_ms > 0 and outcome.longest_gap_ms > 0
