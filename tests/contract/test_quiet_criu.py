"""What stands before CRIU in a runtime's PATH: the request it leaves, and what it leaves alone."""

from __future__ import annotations

import asyncio
import os
import socket
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coordinator.agent.hook import PRE_DUMP, Hook
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
        assert ask_for_less(ours)
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
            ask_for_less(ours)
        assert ours.recv(4096) == DUMP
        assert unread.recv(4096) == b"something else"


@pytest.fixture
async def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hook]:
    """A hook on a host whose CRIU is the stand-in."""
    stand_in = tmp_path / "bin" / "criu"
    stand_in.parent.mkdir()
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o700)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    made = Hook(tmp_path / "it's a hook", tmp_path / "journal", (PRE_DUMP,), lazy=False)
    yield made
    made.close()


async def begin(hook: Hook, *arguments: str, inherit: tuple[int, ...] = ()) -> asyncio.subprocess.Process:
    """CRIU as a runtime starts it."""
    program = str(hook.programs / "criu")
    return await asyncio.create_subprocess_exec(program, *arguments, stdout=PIPE, pass_fds=inherit)


async def said(process: asyncio.subprocess.Process) -> bytes:
    async with asyncio.timeout(20):
        output, _ = await process.communicate()
    assert process.returncode == 0
    return output


@pytest.mark.parametrize("early", [True, False])
async def test_criu_reads_the_quieter_request(hook: Hook, early: bool) -> None:
    """Whether the request is sent before CRIU is started or after it. A version is asked for first."""
    for request_, read in ((b"\x08\x09", b"\x08\x09"), (DUMP, QUIET_DUMP)):
        theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, ours:
            if early:
                theirs.send(request_)
            criu = await begin(hook, "swrk", str(ours.fileno()), inherit=(ours.fileno(),))
            ours.close()
            if not early:
                await asyncio.sleep(0.1)
                theirs.send(request_)
            assert await said(criu) == read


async def test_a_runtime_that_is_gone_reaches_criu_too(hook: Hook) -> None:
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    with ours:
        assert await said(await begin(hook, "swrk", str(ours.fileno()), inherit=(ours.fileno(),))) == b""


@pytest.mark.parametrize("waits", [True, False])
async def test_without_us_criu_reads_the_request_as_it_is(hook: Hook, waits: bool) -> None:
    """Gone before the script comes, or while it waits for a request."""
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, ours:
        if not waits:
            hook.close()
        criu = await begin(hook, "swrk", str(ours.fileno()), inherit=(ours.fileno(),))
        await asyncio.sleep(0.1)
        hook.close()
        theirs.send(DUMP)
        assert await said(criu) == DUMP


async def test_all_else_reaches_criu_as_it_is(hook: Hook) -> None:
    assert await said(await begin(hook, "dump", "--tree", "1")) == b"dump --tree 1\n"
    with open(os.devnull) as no_socket:  # noqa: PTH123
        number = str(no_socket.fileno())
        assert await said(await begin(hook, "check", number)) == f"check {number}\n".encode()
