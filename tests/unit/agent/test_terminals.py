"""Images of terminals, as CRIU writes them, with foreground groups that are there and that are no more."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.agent.criu_images import image_of, messages
from coordinator.agent.protobuf import BYTES, NUMBER, as_varint, fields
from coordinator.agent.terminals import TERMINALS_MAGIC, TREE_MAGIC, mend, with_groups
from coordinator.errors import DumpFailed

SHELL, JOB, OTHER = 100, 300, 1
#: What is around the group in an entry: a nested message (`termios`) is behind it.
BEHIND = b"\x40\x88\x90\x08" + b"\x4a\x05\x08\xac\x02\x10\x01"


def number(field: int, value: int) -> bytes:
    return as_varint(field << 3) + as_varint(value)


def terminal(session: int, group: int, name: int = 5) -> bytes:
    """A `tty_info_entry`; one of its flags and its type are in it, too."""
    return number(1, name) + number(2, 1) + number(3, 0) + number(6, session) + number(7, group) + BEHIND


def terminals(*entries: bytes) -> bytes:
    return image_of(entries, TERMINALS_MAGIC)


def tree(*processes: tuple[int, int, int]) -> bytes:
    """Processes by their pid, group and session; each with two threads."""
    entries = (
        number(1, pid) + number(2, 1) + number(3, group) + number(4, session) + number(5, pid) + number(5, pid + 1)
        for pid, group, session in processes
    )
    return image_of(entries, TREE_MAGIC)


INIT, LEADER = (OTHER, OTHER, OTHER), (SHELL, SHELL, SHELL)


def test_a_group_that_is_no_more_gives_way_to_the_leaders_group() -> None:
    before = terminals(terminal(OTHER, OTHER, 3), terminal(SHELL, JOB, 4), terminal(SHELL, JOB, 5))
    after = terminals(terminal(OTHER, OTHER, 3), terminal(SHELL, SHELL, 4), terminal(SHELL, SHELL, 5))
    assert with_groups(before, tree(INIT, LEADER)) == after


def test_a_leader_whose_number_is_longer_than_the_groups_makes_the_message_longer() -> None:
    leader = (40_000, 40_000, 40_000)
    assert with_groups(terminals(terminal(40_000, 7)), tree(leader)) == terminals(terminal(40_000, 40_000))


@pytest.mark.parametrize(
    ("entry", "processes"),
    [
        (terminal(SHELL, JOB), [LEADER, (JOB, JOB, SHELL)]),  # the job runs, or is not reaped yet
        (terminal(SHELL, JOB), [LEADER, (JOB + 1, JOB, SHELL)]),  # its first process has ended, and others go on
        (terminal(SHELL, SHELL), [LEADER]),
        (terminal(0, 0), [LEADER]),  # no session's terminal
        (terminal(OTHER, JOB), [LEADER]),  # whose leader is somewhere else
    ],
)
def test_what_can_be_restored_or_is_none_of_ours_stays(entry: bytes, processes: list[tuple[int, int, int]]) -> None:
    assert with_groups(terminals(entry), tree(*processes)) == terminals(entry)


def test_a_number_that_has_gone_to_a_group_of_another_session_is_no_group_of_this_one() -> None:
    reused = (JOB, JOB, JOB)
    assert with_groups(terminals(terminal(SHELL, JOB)), tree(LEADER, reused)) == terminals(terminal(SHELL, SHELL))


def test_the_images_of_a_dump_are_mended_where_they_are(tmp_path: Path) -> None:
    mend(tmp_path)  # none without a terminal
    (tmp_path / "pstree.img").write_bytes(tree(LEADER))
    (tmp_path / "tty-info.img").write_bytes(terminals(terminal(SHELL, JOB)))
    mend(tmp_path)
    assert (tmp_path / "tty-info.img").read_bytes() == terminals(terminal(SHELL, SHELL))


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (terminals(terminal(SHELL, JOB))[:-1], "it ends in a message"),
        (terminals()[:7], "unknown magic numbers"),
        (tree(LEADER), "unknown magic numbers"),
        (terminals() + b"\1", "ends in a message's length"),
        (terminals(b"\x0d\1\2\3\4"), "wire type 5"),
        (terminals(b"\x08\x80"), "index out of range"),
        (terminals(number(1, 5)), "6"),
    ],
)
def test_images_that_cannot_be_read_are_told(tmp_path: Path, image: bytes, why: str) -> None:
    (tmp_path / "pstree.img").write_bytes(tree(LEADER))
    (tmp_path / "tty-info.img").write_bytes(image)
    with pytest.raises(DumpFailed, match=f"tty-info.img or pstree.img cannot be read: .*{why}"):
        mend(tmp_path)


def test_messages_are_read_as_they_were_put_together() -> None:
    assert list(messages(terminals(b"\x08\x05", b"", BEHIND), TERMINALS_MAGIC)) == [b"\x08\x05", b"", BEHIND]
    assert [(each.number, each.kind) for each in fields(BEHIND)] == [(8, NUMBER), (9, BYTES)]


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 1 << 21, (1 << 64) - 1])
def test_numbers_are_written_and_read(value: int) -> None:
    (found,) = fields(number(7, value))
    assert (found.number, found.value, found.begin, found.content) == (7, value, 0, 1)
    assert found.end == 1 + len(as_varint(value))
