"""Makes CRIU's images of terminals such that they can be restored, whatever the shells on them are doing.

A terminal has a foreground group of processes, and keeps its number when the last of them has ended: until the shell,
which has reaped its job, takes the terminal back (tcsetpgrp(3)). CRIU dumps that number, and its restore gives up
because there is no such group (criu/tty.c, tty_set_prgp; drivers/tty/tty_jobctrl.c, tiocspgrp). A shell that starts a
process for every line it reads is often between the two.

In the image such a terminal gets the group of its session's leader. That one exists, as CRIU dumps no other sessions
(dump_verify_tty_sids), and the shell is mostly it; any shell takes the terminal for itself next, as it would have here.
A session that never does so has the terminal in its leader's hands from then on, which could not read from it before.
"""

from __future__ import annotations

from pathlib import Path

from coordinator.agent.criu_images import image_of, messages
from coordinator.agent.protobuf import NUMBER, Field, as_varint, fields
from coordinator.errors import DumpFailed

_TERMINALS, _TREE = "tty-info.img", "pstree.img"
#: criu/include/magic.h.
TERMINALS_MAGIC, TREE_MAGIC = 0x59453036, 0x50273030
#: images/tty.proto (tty_info_entry), images/pstree.proto.
_TERMINAL_SESSION, _TERMINAL_GROUP = 6, 7
_GROUP, _SESSION = 3, 4


def mend(images: Path) -> None:
    """Change a complete dump's image of terminals, where one of them has a foreground group that is no more.

    The tasks are frozen: without terminals it takes some 10 µs, with a hundred terminals and processes 2 ms. Raises
    ``DumpFailed`` for images that cannot be read."""
    terminals = images / _TERMINALS
    if not terminals.exists():
        return
    try:
        before = terminals.read_bytes()
        after = with_groups(before, (images / _TREE).read_bytes())
    except (ValueError, IndexError, KeyError) as error:
        raise DumpFailed(f"{_TERMINALS} or {_TREE} cannot be read: {error}", "This CRIU is not known.") from error
    if after != before:
        terminals.write_bytes(after)


def with_groups(terminals: bytes, tree: bytes) -> bytes:
    """The image of terminals as it can be restored with these processes (pure).

    Raises ``ValueError``, ``IndexError`` or ``KeyError`` for images that cannot be read."""
    processes = [_numbers(each) for each in messages(tree, TREE_MAGIC)]
    groups = {(each[_GROUP].value, each[_SESSION].value) for each in processes}
    return image_of((_with_group(each, groups) for each in messages(terminals, TERMINALS_MAGIC)), TERMINALS_MAGIC)


def _with_group(terminal: bytes, groups: set[tuple[int, int]]) -> bytes:
    entry = _numbers(terminal)
    session, group = entry[_TERMINAL_SESSION].value, entry[_TERMINAL_GROUP]
    # The number of a group that is no more may have gone to one of another session.
    if (group.value, session) in groups or (session, session) not in groups:
        return terminal
    return terminal[: group.content] + as_varint(session) + terminal[group.end :]


def _numbers(message: bytes) -> dict[int, Field]:
    return {each.number: each for each in fields(message) if each.kind == NUMBER}
