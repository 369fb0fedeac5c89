"""The journal: its transition table, what a crash leaves of it, and that the commit point is on disk in time."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest

from coordinator.errors import IllegalTransition, JournalDamaged
from coordinator.journal import (
    FINISHED,
    TRANSITIONS,
    Journal,
    LiveLock,
    Phase,
    check_transition,
    has_begun,
    is_committed,
    journals,
    read_state,
)

FORWARD = (
    Phase.OPENED,
    Phase.PREPARED,
    Phase.COPYING,
    Phase.DIVERTED,
    Phase.FROZEN,
    Phase.DUMPED,
    Phase.STAGED,
    Phase.COMMITTED,
    Phase.RESUMED,
    Phase.RELEASED,
)
BEFORE_COMMIT = FORWARD[:7]


def make(folder: Path) -> Journal:
    return Journal.create(folder, "m-1", "source", {"workload": {"name": "counter"}})


@pytest.mark.parametrize(("here", "there"), list(itertools.product(Phase, Phase)))
def test_every_pair_of_phases(here: Phase, there: Phase) -> None:
    step = here in FORWARD and there in FORWARD and FORWARD.index(there) == FORWARD.index(here) + 1
    abort = here in BEFORE_COMMIT and there is Phase.ABORTED
    undone = (here, there) == (Phase.ABORTED, Phase.ROLLED_BACK)
    if step or abort or undone:
        check_transition(here, there)
    else:
        with pytest.raises(IllegalTransition):
            check_transition(here, there)


def test_nothing_leads_back_from_the_commit_point() -> None:
    reached, new = set[Phase](), {Phase.COMMITTED}
    while new:
        reached |= new
        new = {there for here in new for there in TRANSITIONS[here]} - reached
    assert reached == {Phase.COMMITTED, Phase.RESUMED, Phase.RELEASED}
    assert all(is_committed(phase) for phase in reached)
    assert not any(is_committed(phase) for phase in set(Phase) - reached)
    assert {here for here, after in TRANSITIONS.items() if not after} == FINISHED


def test_an_illegal_phase_is_not_recorded(tmp_path: Path) -> None:
    journal = make(tmp_path)
    with pytest.raises(IllegalTransition):
        journal.enter(Phase.COMMITTED)
    assert journal.phase is read_state(journal.path).phase is Phase.OPENED


def test_where_a_freeze_went_is_a_record_that_changes_nothing(tmp_path: Path) -> None:
    journal = make(tmp_path)
    before = read_state(journal.path)
    journal.freeze_parts([("CRIU dumps", 30.12345), ("images sent", 2.0)])
    assert read_state(journal.path) == before
    record = json.loads(journal.path.read_text().splitlines()[-1])
    assert record["kind"] == "freeze"
    assert record["parts"] == [{"name": "CRIU dumps", "ms": 30.123}, {"name": "images sent", "ms": 2.0}]


def test_what_is_recorded_is_read_again(tmp_path: Path) -> None:
    journal = make(tmp_path)
    kept = journal.deed("gate", {"pid": 7})
    gone = journal.deed("addresses", {})
    journal.enter(Phase.PREPARED)
    journal.undone(gone)
    journal.enter(Phase.ABORTED, reason="why")
    journal.close()
    journal.close()
    state = read_state(journal.path)
    assert (state.migration, state.role, state.plan) == ("m-1", "source", {"workload": {"name": "counter"}})
    assert (state.phase, state.deeds, state.notes) == (Phase.ABORTED, {kept: ("gate", {"pid": 7})}, ["why"])
    again = Journal.load(journal.path)
    assert again.deed("dump", {}) == kept + 1
    assert journal.path.stat().st_mode & 0o777 == 0o600


def test_a_migration_has_one_journal_of_a_role(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(FileExistsError):
        make(tmp_path)


def test_a_torn_last_line_never_happened_and_spoils_nothing(tmp_path: Path) -> None:
    journal = make(tmp_path)
    journal.enter(Phase.PREPARED)
    whole = journal.path.read_bytes()
    journal.enter(Phase.COPYING)
    last = journal.path.read_bytes()[len(whole) :]
    for length in range(len(last)):
        journal.path.write_bytes(whole + last[:length])
        assert read_state(journal.path).phase is Phase.PREPARED
        again = Journal.load(journal.path)
        again.enter(Phase.ABORTED)
        again.close()
        assert read_state(journal.path).phase is Phase.ABORTED


@pytest.mark.parametrize("line", ["not json", "[]", '{"kind":"phase"', ""])
def test_any_other_damage_is_told(tmp_path: Path, line: str) -> None:
    journal = make(tmp_path)
    first, *_ = journal.path.read_text().split("\n")
    journal.path.write_text(f'{first}\n{line}\n{{"kind":"phase","phase":"PREPARED"}}\n')
    with pytest.raises(JournalDamaged, match=f"{journal.path}:2"):
        read_state(journal.path)


def test_a_journal_without_its_first_record_is_damaged_or_of_a_migration_that_never_began(tmp_path: Path) -> None:
    journal = make(tmp_path)
    journal.path.write_text('{"kind":"phase","phase":"PREPARED"}\n')
    with pytest.raises(JournalDamaged, match="first record"):
        read_state(journal.path)
    journal.path.write_text('{"kind":"open"')
    assert not has_begun(journal.path)
    assert journals(tmp_path) == []
    with pytest.raises(JournalDamaged, match="no record in it"):
        read_state(journal.path)


def test_the_commit_point_is_on_disk_before_enter_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = make(tmp_path)
    for phase in FORWARD[1:7]:
        journal.enter(phase, durable=False)
    synced: list[tuple[Phase, bool]] = []

    def fsync(descriptor: int) -> None:
        assert Path(f"/proc/self/fd/{descriptor}").readlink() == journal.path
        written = '"phase":"COMMITTED"' in journal.path.read_text()
        synced.append((journal.phase, written))

    monkeypatch.setattr(os, "fsync", fsync)
    journal.enter(Phase.COMMITTED)
    # Written, then synced, and only then is it the phase.
    assert synced == [(Phase.STAGED, True)]
    assert journal.phase is Phase.COMMITTED
    journal.enter(Phase.RESUMED, durable=False)
    assert len(synced) == 1


def test_a_new_journal_is_on_disk_with_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink()))
    journal = make(tmp_path)
    assert synced == [journal.path, journal.path.parent, tmp_path]


def test_a_record_that_cannot_be_synced_never_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = make(tmp_path)
    for phase in FORWARD[1:7]:
        journal.enter(phase)
    before = journal.path.read_bytes()

    def fsync(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        journal.enter(Phase.COMMITTED)
    assert journal.path.read_bytes() == before
    assert journal.phase is Phase.STAGED
    with pytest.raises(OSError, match="Input/output"):
        Journal.create(tmp_path, "m-2", "source", {})
    assert journals(tmp_path) == [journal.path]


def test_a_record_that_is_written_in_part_never_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = make(tmp_path)
    before = journal.path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
    with pytest.raises(OSError, match="No space"):
        journal.deed("gate", {})
    assert journal.path.read_bytes() == before
    assert journal.state.deeds == {}


def test_an_observed_phase_need_not_follow_the_last(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "m-1", "coordinator", {})
    journal.observe(Phase.DUMPED)
    journal.observe(Phase.RELEASED, "moved")
    assert read_state(journal.path).phase is Phase.RELEASED
    assert read_state(journal.path).notes == ["moved"]


def test_journals_are_found_oldest_first(tmp_path: Path) -> None:
    paths = [Journal.create(tmp_path, name, "source", {}).path for name in ("b", "a", "c")]
    for age, path in enumerate(paths):
        os.utime(path, (age, age))
    assert journals(tmp_path) == paths


def test_no_text_can_be_mistaken_for_the_commit_point(tmp_path: Path) -> None:
    """CRIU's hook looks for the word of the record in the raw line."""
    text = 'x"phase":"COMMITTED"x'
    journal = Journal.create(tmp_path, "m-1", "source", {"name": text})
    journal.deed("gate", {"note": text})
    journal.enter(Phase.ABORTED, reason=text)
    assert '"phase":"COMMITTED"' not in journal.path.read_text()
    assert json.loads(journal.path.read_text().split("\n")[-2])["reason"] == text


def test_one_half_is_live(tmp_path: Path) -> None:
    first, second = LiveLock(tmp_path, "source"), LiveLock(tmp_path, "source")
    other = LiveLock(tmp_path, "destination")
    assert (first.take(), second.take(), other.take()) == (True, False, True)
    second.release()
    assert not second.take()
    first.release()
    assert second.take()
    second.release()
    other.release()
    assert list(tmp_path.iterdir()) == []
