"""When a System V segment can have been written to by nobody but who is asked, over tables that are made up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest

from coordinator.agent.memory.base import PAGE_BYTES, Backing, Changes, Mapping, ProcessChanges
from coordinator.agent.memory.segments import Look, Row, Segments, parse_rows

DEVICE = "00:01"
HEAD = "key shmid perms size cpid lpid nattch uid gid cuid cgid atime dtime ctime rss swap"
TEXT = f"""{HEAD}
    0  32769  600  1048576  10  11  2  0  0  0  0  100  90  80  8192  0
"""


@dataclass
class MadeUp:
    """A table with one segment, and a clock."""

    attachments: int = 2
    attached_s: int = 100
    detached_s: int = 90
    last_pid: int = 11
    clock_s: float = 200.0
    since_boot_s: float = 50.0
    size_bytes: int = 1 << 20
    device: str = DEVICE
    holes: frozenset[int] = frozenset()
    unwatched: frozenset[int] = frozenset()
    closed: bool = False

    def look(self) -> Look:
        numbers = (0, 7, 600, self.size_bytes, 10, self.last_pid, self.attachments, 0, 0, 0, 0)
        row = Row(tuple(map(str, (*numbers, self.attached_s, self.detached_s, 80))))
        return Look({7: row}, self.clock_s, self.since_boot_s)

    def watch(self, wanted: Iterable[int], pids: Iterable[int]) -> frozenset[int]:
        assert list(pids) == [10, 11]
        return frozenset(wanted) - self.unwatched

    def punched(self) -> frozenset[int]:
        found, self.holes = self.holes, frozenset()
        return found

    def passes(self, seconds: float) -> None:
        self.clock_s += seconds
        self.since_boot_s += seconds

    def close(self) -> None:
        self.closed = True


def answers(mapped: int, *, device: str = DEVICE) -> list[ProcessChanges]:
    """A process that has the segment attached so often, and one that has not."""
    mapping = Mapping(0, PAGE_BYTES, "rw-s", Backing.SHMEM, 0, device, 7, "/SYSV00000000 (deleted)")
    other = replace(mapping, inode=8, name="/dev/zero (deleted)")
    found = Changes((), (), (*(mapping for _ in range(mapped)), other), 0)
    return [ProcessChanges(10, 1, 1, False, found), ProcessChanges(11, 2, 1, False, replace(found, mappings=()))]


def looked(segments: Segments, mapped: int = 2) -> frozenset[int]:
    """One look; what nobody can have written to since the look before."""
    untouched = segments.untouched([10, 11])
    segments.take(answers(mapped))
    return untouched


def test_a_row_is_told_from_the_others_by_its_id_and_from_itself_by_all_but_its_pages() -> None:
    (number, row), *others = parse_rows(TEXT).items()
    assert (number, others) == (32769, [])
    assert (row.bytes, row.attachments, row.changed_s) == (1 << 20, 2, 100)
    assert parse_rows(TEXT.replace(" 8192", " 12288")) == {number: row}
    assert parse_rows(TEXT.replace(" 11 ", " 12 ")) != {number: row}


def test_nobody_came_and_nothing_is_doubted() -> None:
    table = MadeUp()
    segments = Segments(table)
    assert looked(segments) == frozenset()
    table.passes(1)
    assert looked(segments) == segments.closed == {7}


@pytest.mark.parametrize(
    "change",
    [
        {"attachments": 3, "attached_s": 201},
        {"attached_s": 201, "detached_s": 201},
        {"detached_s": 201, "attachments": 1},
        {"last_pid": 12},
    ],
    ids=str,
)
def test_who_came_or_went_may_have_written(change: dict[str, int]) -> None:
    table = MadeUp()
    segments = Segments(table)
    looked(segments)
    table.passes(1)
    for name, value in change.items():
        setattr(table, name, value)
    assert looked(segments) == frozenset()


@pytest.mark.parametrize("mapped", [0, 1, 3])
def test_who_is_not_asked_may_write(mapped: int) -> None:
    segments = Segments(MadeUp())
    looked(segments, mapped)
    assert not segments.closed
    assert looked(segments) == frozenset()


@pytest.mark.parametrize(("clock_s", "closed"), [(100.9, False), (103.0, False), (103.1, True)])
def test_times_that_are_young_do_not_tell_of_who_comes_next(clock_s: float, closed: bool) -> None:
    segments = Segments(MadeUp(clock_s=clock_s))
    looked(segments)
    assert (segments.closed == {7}) == closed


@pytest.mark.parametrize("set_s", [-100.0, -1.0, 1.0])
def test_a_clock_that_is_set_tells_nothing(set_s: float) -> None:
    table = MadeUp()
    segments = Segments(table)
    looked(segments)
    table.passes(1)
    table.clock_s += set_s
    assert looked(segments) == frozenset()
    table.passes(1)
    assert looked(segments) == ({7} if set_s > -97 else frozenset())


def test_a_hole_that_was_punched_is_told_by_nobody_else() -> None:
    table = MadeUp()
    segments = Segments(table)
    looked(segments)
    table.holes = frozenset({7})
    assert looked(segments) == frozenset()
    assert looked(segments) == {7}


def test_where_a_hole_would_not_be_told_nothing_is_known() -> None:
    segments = Segments(MadeUp(unwatched=frozenset({7})))
    looked(segments)
    assert not segments.closed


def test_a_small_one_is_not_worth_it() -> None:
    segments = Segments(MadeUp(size_bytes=(1 << 20) - 1))
    looked(segments)
    assert not segments.closed


def test_a_mapping_of_another_device_is_no_attachment() -> None:
    """Of huge pages; or of a file that is called so."""
    segments = Segments(MadeUp())
    segments.untouched([10, 11])
    segments.take([*answers(2), *answers(1, device="00:15")])
    assert not segments.closed


def test_the_last_look_goes_by_what_was_there_at_the_freeze() -> None:
    """CRIU attaches every segment after that."""
    table = MadeUp()
    segments = Segments(table)
    looked(segments)
    segments.at_freeze()
    table.attached_s = table.detached_s = 201
    assert looked(segments) == {7}


def test_without_the_moment_of_the_freeze_everything_is_doubted() -> None:
    table = MadeUp()
    segments = Segments(table)
    looked(segments)
    table.attached_s = table.detached_s = 201
    assert looked(segments) == frozenset()


def test_without_a_table_no_segment_is_known() -> None:
    segments = Segments(None)
    segments.at_freeze()
    assert looked(segments) == looked(segments) == segments.closed == frozenset()
    segments.close()


def test_the_table_goes_with_it() -> None:
    table = MadeUp()
    Segments(table).close()
    assert table.closed
