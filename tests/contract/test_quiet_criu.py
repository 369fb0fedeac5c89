"""What stands before CRIU in a runtime's PATH: the request it leaves, and what it leaves alone."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.agent import quiet_criu
from coordinator.agent.process import agent_program
from coordinator.agent.quiet_criu import ask_for_less, quieter

#: criu_req: type 1 (dump), opts {images_dir_fd 7, pid 300, log_level 4, log_file "dump.log"}.
OPTIONS = b"\x08\x07\x10\xac\x02\x48\x04\x62\x08dump.log"
DUMP = b"\x08\x01\x12" + bytes((len(OPTIONS),)) + OPTIONS
QUIET_DUMP = b"\x08\x01\x12" + bytes((len(OPTIONS) + 2,)) + OPTIONS + b"\x48\x02"

#: Reads one request, as CRIU does, and says what it was, and what its arguments are.
STAND_IN = """#!/bin/sh
exec python3 -c 'import socket, sys
if sys.argv[1] == "swrk":
    request = socket.socket(fileno=int(sys.argv[2])).recv(4096)
    sys.stdout.buffer.write(request)
else:
    print(*sys.argv[1:])' "$@"
"""


@pytest.mark.parametrize("kind", [b"\x01", b"\x02"])
def test_a_request_to_dump_or_restore_asks_for_warnings_behind_what_it_asked_for_before(kind: bytes) -> None:
    assert quieter(b"\x08" + kind + DUMP[2:]) == b"\x08" + kind + QUIET_DUMP[2:]


def test_the_order_of_a_requests_fields_is_free() -> None:
    assert quieter(DUMP[2:] + b"\x18\x01" + DUMP[:2]) == QUIET_DUMP[2:] + b"\x18\x01" + QUIET_DUMP[:2]


def test_options_that_grow_past_a_byte_of_length_are_still_whole() -> None:
    long = OPTIONS + b"\x62\x6c" + b"x" * 108
    assert len(long) == 127
    assert quieter(b"\x08\x01\x12\x7f" + long) == b"\x08\x01\x12\x81\x01" + long + b"\x48\x02"


@pytest.mark.parametrize("request_", [b"\x08\x09", b"\x08\x03" + DUMP[2:], b"\x08\x01", b""])
def test_other_requests_are_left_alone(request_: bytes) -> None:
    assert quieter(request_) is None


@pytest.mark.parametrize("request_", [b"\x08", b"\x08\x01\x12\x80", b"\x0d\x01\x02\x03\x04"])
def test_what_cannot_be_read_is_an_error(request_: bytes) -> None:
    with pytest.raises((IndexError, ValueError)):
        quieter(request_)


def test_a_request_is_replaced_where_it_waits_and_the_sockets_stay_what_they_are() -> None:
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, ours:
        theirs.send(DUMP)
        assert ask_for_less(ours.fileno())
        assert ours.recv(4096) == QUIET_DUMP
        ours.send(b"answer")
        assert theirs.recv(4096) == b"answer"
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(4096)


def test_with_two_that_may_be_the_other_end_the_request_is_left_as_it_was() -> None:
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    other, unread = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, ours, other, unread:
        other.send(b"something else")
        theirs.send(DUMP)
        with pytest.raises(OSError, match="2 sockets"):
            ask_for_less(ours.fileno())
        assert ours.recv(4096) == DUMP
        assert unread.recv(4096) == b"something else"


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., bytes]:
    """Runs the program in front of a stand-in for CRIU; returns what that says."""
    stand_in = tmp_path / "criu"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o700)
    program = agent_program(quiet_criu.__name__, str(stand_in)).argv

    def start(*arguments: str, inherit: tuple[int, ...] = ()) -> bytes:
        return subprocess.run([*program, *arguments], pass_fds=inherit, stdout=subprocess.PIPE, check=True).stdout

    return start


def test_the_program_becomes_criu_which_reads_the_quieter_request(run: Callable[..., bytes]) -> None:
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, ours:
        theirs.send(DUMP)
        assert run("swrk", str(ours.fileno()), inherit=(ours.fileno(),)) == QUIET_DUMP


def test_a_runtime_that_is_gone_reaches_criu_too(run: Callable[..., bytes]) -> None:
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    with ours:
        assert run("swrk", str(ours.fileno()), inherit=(ours.fileno(),)) == b""


def test_all_else_reaches_criu_as_it_is(run: Callable[..., bytes]) -> None:
    assert run("dump", "--tree", "1") == b"dump --tree 1\n"
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        assert run("check", str(null)) == f"check {null}\n".encode()
    finally:
        os.close(null)
