"""The one door to subprocesses: what a failure says, deadlines, and how a process is known for ever."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from coordinator.agent.process import (
    Command,
    describe_failure,
    first_explaining_line,
    run,
    start,
    start_time,
    wait_gone,
)
from coordinator.errors import CommandFailed, DeadlineExceeded


async def test_output_and_status() -> None:
    done = await run(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (done.status, done.stdout, done.stderr) == (3, "out\n", "err\n")
    with pytest.raises(CommandFailed, match=r"^sh -c 'echo out.*': exit status 3: err$"):
        done.checked()


async def test_a_success_is_checked_silently() -> None:
    done = await run(["true"])
    assert done.checked() is done


async def test_the_environment_is_added_to_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "a")
    assert (await run(["sh", "-c", "echo $OURS$THEIRS"], environment={"THEIRS": "b"})).stdout == "ab\n"


async def test_there_is_no_input() -> None:
    assert (await run(["cat"])).stdout == ""


@pytest.mark.parametrize("argv", [["/nonexistent/program"], ["/etc/hostname"]])
async def test_what_cannot_be_started_is_a_failed_command(argv: list[str], tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match=argv[0]):
        await run(argv)
    with pytest.raises(CommandFailed, match=argv[0]):
        await start(Command(tuple(argv), {}), tmp_path / "output")


async def test_a_deadline_kills_the_command() -> None:
    with pytest.raises(DeadlineExceeded, match="sleep 1000: not finished after 0 s"):
        await run(["sleep", "1000"], deadline_s=0)


async def test_a_cancelled_command_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "pid"
    os.mkfifo(ready)
    task = asyncio.create_task(run(["sh", "-c", f"echo $$ >{ready}; exec sleep 1000"]))
    pid = int(await asyncio.to_thread(ready.read_text))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert start_time(pid) is None


async def test_a_started_command_is_in_a_session_of_its_own_and_writes_to_its_file(tmp_path: Path) -> None:
    running = await start(Command(("sh", "-c", "echo $WORD; echo $$; exit 4"), {"WORD": "w"}), tmp_path / "output")
    assert await running.wait() == 4
    assert (tmp_path / "output").read_text() == f"w\n{running.pid}\n"
    long = await start(Command(("sleep", "1000"), {}), tmp_path / "output")
    assert os.getsid(long.pid) == long.pid
    os.kill(long.pid, 9)
    assert await long.wait() == -9


def test_a_command_can_be_pasted() -> None:
    assert str(Command(("runc", "state", "a b"), {"X": "1 2"})) == "X='1 2' runc state 'a b'"


def test_a_failure_in_one_line() -> None:
    command = Command(("criu", "dump"), {})
    assert describe_failure(command, 1, "(00.1) Error (x.c:1): first\nError: later\n") == (
        "criu dump: exit status 1: (00.1) Error (x.c:1): first"
    )
    assert describe_failure(command, -9, "") == "criu dump: killed by signal 9: no output"


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("one\ntwo\n\n", "two"),
        ("Error: Can't setup RLIMIT_NOFILE for self\nWarn: y\nError: real\n", "Error: real"),
        ("\n \n", "no output"),
    ],
)
def test_the_line_that_explains(output: str, line: str) -> None:
    assert first_explaining_line(output) == line


def test_start_time_reads_past_any_name(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    fields = ["S", *map(str, range(4, 22)), "4242", "0"]
    (tmp_path / "7/stat").write_text(f"7 (a) Z (b) {' '.join(fields)}")
    assert start_time(7, tmp_path) == 4242
    (tmp_path / "7/stat").write_text(f"7 (a) {' '.join(['Z', *fields[1:]])}")
    assert start_time(7, tmp_path) is None
    assert start_time(8, tmp_path) is None


async def test_wait_gone() -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:  # noqa: ASYNC220
        started = start_time(process.pid)
        assert started is not None
        assert not await wait_gone(process.pid, started, 0)
        assert await wait_gone(process.pid, started + 1, 0)  # another process of that pid
        process.kill()
        assert await wait_gone(process.pid, started, 20)  # a zombie is gone, though we have not reaped it
