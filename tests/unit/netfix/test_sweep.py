"""What a sweep takes away, and what it spares."""

from netfix.gate import CLOSED, GateReport, holding
from netfix.leftovers import Leftover
from netfix.sweep import judge

A = "192.0.2.10"
LOCK = Leftover("criu-table", "inet", "CRIU-1", "", "a lock", "nft delete table inet CRIU-1")
GATE = Leftover("gate", "inet", "livemove-old", "", "a gate", "livemove recover old")
OLD = GateReport("old", CLOSED, (A,))


def _judged(*gates: GateReport, journaled: str = "", queue: int = 0, criu: bool = False) -> dict[str, str]:
    found = judge(gates, [LOCK, GATE], journaled={journaled}, listeners={queue}, criu=criu)
    return {one.subject: one.spared for one in found}


def test_everything_that_nobody_needs() -> None:
    assert _judged(OLD) == {"old": "", "inet CRIU-1": ""}


def test_a_migration_with_a_journal_is_for_livemove_to_end() -> None:
    assert _judged(OLD, journaled="old") == {
        "old": "livemove has a journal of it: livemove recover old",
        "inet CRIU-1": "",
    }


def test_nothing_is_touched_while_a_hold_is_live() -> None:
    live = GateReport("live", holding(7), (A,))
    assert all(_judged(OLD, live, queue=7).values())
    assert not any(_judged(OLD, live, queue=8).values()), "its process is gone"


def test_criu_is_left_alone_while_it_runs() -> None:
    assert _judged(OLD, criu=True) == {"old": "", "inet CRIU-1": "criu runs on this host"}
