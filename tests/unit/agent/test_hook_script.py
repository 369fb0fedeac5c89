"""The hook script as CRIU runs it, in /bin/sh: what it waits for, and what it says then.

A script that waits is seen waiting by its `flock` child in /proc; nothing here waits for a clock.
"""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from coordinator.agent.hook import POST_DUMP, POST_RESTORE, POST_RESUME, PRE_DUMP, PRE_RESUME, Hook
from coordinator.agent.obstacles import MOST_DELETED_BYTES
from coordinator.journal import Journal, Phase

ACTIONS = (PRE_DUMP, POST_DUMP, POST_RESTORE)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = Journal.create(tmp_path / "it's a state", "m-1", "source", {})
    yield made
    made.close()


@pytest.fixture
async def hook(tmp_path: Path, journal: Journal) -> AsyncIterator[Hook]:
    made = Hook(tmp_path / "it's a hook", journal.path, ACTIONS, lazy=False)
    yield made
    made.close()


def script(folder: Path) -> Path:
    return folder / "it's a hook" / "hook"


def begin(folder: Path, action: str, pid: int = 0) -> subprocess.Popen[bytes]:
    told = {"CRTOOLS_SCRIPT_ACTION": action, "CRTOOLS_INIT_PID": str(pid) if pid else ""}
    return subprocess.Popen(["/bin/sh", str(script(folder))], env={**os.environ, **told}, stdin=subprocess.DEVNULL)


def sleeping() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "1000"])


async def exit_status(process: subprocess.Popen[bytes]) -> int:
    return await asyncio.to_thread(process.wait, 20)


async def standing(hook: Hook, folder: Path, action: str) -> subprocess.Popen[bytes]:
    """A script that has said where it stands and is held there."""
    process = begin(folder, action)
    await hook.arrival(action)
    assert process.poll() is None
    return process


def record(journal: Journal, phase: str) -> None:
    steps: dict[str, list[Phase]] = {
        "committed": list(Phase)[1:8],
        "aborted": [Phase.ABORTED],
        "nothing": [],
    }
    for each in steps[phase]:
        journal.enter(each)


@pytest.mark.parametrize(
    ("action", "phase", "status"),
    [
        (POST_DUMP, "committed", 0),
        (POST_DUMP, "aborted", 1),
        (POST_DUMP, "nothing", 1),
        (POST_RESTORE, "committed", 0),
        (POST_RESTORE, "aborted", 1),
        (PRE_DUMP, "committed", 1),  # not allowed to go on
    ],
)
async def test_it_holds_until_it_is_released_and_then_follows_the_journal(  # noqa: PLR0917
    tmp_path: Path, hook: Hook, journal: Journal, action: str, phase: str, status: int
) -> None:
    process = await standing(hook, tmp_path, action)
    record(journal, phase)
    assert process.poll() is None
    hook.release(action)
    hook.release(action)
    assert await exit_status(process) == status


async def test_pre_dump_goes_on_when_it_is_allowed_to(tmp_path: Path, hook: Hook) -> None:
    process = await standing(hook, tmp_path, PRE_DUMP)
    hook.allow()
    hook.release(PRE_DUMP)
    assert await exit_status(process) == 0


async def test_a_decision_that_is_torn_is_none(tmp_path: Path, hook: Hook, journal: Journal) -> None:
    with journal.path.open("a") as file:
        file.write('{"kind":"phase","phase":"COMMITTED"')
    process = await standing(hook, tmp_path, POST_DUMP)
    hook.close()
    hook.close()
    assert await exit_status(process) == 1


@pytest.mark.parametrize(("phase", "status"), [("committed", 0), ("aborted", 1)])
async def test_in_doubt_a_restore_goes_on_waiting(
    tmp_path: Path, hook: Hook, journal: Journal, phase: str, status: int
) -> None:
    process = await standing(hook, tmp_path, POST_RESTORE)
    hook.close()
    assert await polls(process)
    record(journal, phase)
    assert await exit_status(process) == status


async def polls(process: subprocess.Popen[bytes]) -> bool:
    """Wait until it has a `sleep` of its own: then it has read the journal, and found nothing."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None:
        for child in children.read_text().split():
            try:
                if Path(f"/proc/{child}/comm").read_text() == "sleep\n":
                    return True
            except (FileNotFoundError, ProcessLookupError):
                pass
        await asyncio.sleep(0)
    return False


@pytest.mark.parametrize(
    "action",
    ["pre-restore", "network-lock", "setup-namespaces", "post-resume", "post-setup-namespaces", "status-ready"],
)
async def test_at_other_actions_it_does_nothing(tmp_path: Path, hook: Hook, action: str) -> None:
    assert await exit_status(begin(tmp_path, action)) == 0


@pytest.mark.parametrize("action", [PRE_RESUME, POST_RESUME])
async def test_about_the_resume_it_reports_and_holds_nothing_up(tmp_path: Path, hook: Hook, action: str) -> None:
    assert await exit_status(begin(tmp_path, action, pid=77)) == 0
    assert await hook.arrival(action) == 77


@pytest.mark.parametrize("lazy", [True, False])
async def test_criu_is_told_by_its_configuration_file_whether_memory_follows(
    tmp_path: Path, journal: Journal, *, lazy: bool
) -> None:
    made = Hook(tmp_path / "hook", journal.path, (PRE_DUMP, POST_DUMP), lazy=lazy)
    made.close()
    lines = made.config.read_text().splitlines()
    common = ["network-lock skip", f"ghost-limit {MOST_DELETED_BYTES}", f"action-script {tmp_path}/hook/hook"]
    assert lines == [*common, *(["lazy-pages"] if lazy else [])]


@pytest.fixture
async def lazy(tmp_path: Path, journal: Journal) -> AsyncIterator[Hook]:
    """The hook of a dump that leaves pages out."""
    made = Hook(tmp_path / "it's a hook", journal.path, (PRE_DUMP, POST_DUMP), lazy=True)
    yield made
    made.close()


@pytest.mark.parametrize(("phase", "status", "ended"), [("committed", 0, True), ("aborted", 1, False)])
async def test_a_lazy_dump_kills_the_tasks_on_a_commit_and_only_then(  # noqa: PLR0917
    tmp_path: Path, lazy: Hook, journal: Journal, phase: str, status: int, ended: bool
) -> None:
    tasks = [sleeping(), sleeping()]
    try:
        lazy.doom([task.pid for task in tasks])
        process = await standing(lazy, tmp_path, POST_DUMP)
        record(journal, phase)
        lazy.release(POST_DUMP)
        assert await exit_status(process) == status
        if ended:
            assert [await exit_status(task) for task in tasks] == [-9, -9]
        assert [task.poll() is not None for task in tasks] == [ended, ended]
    finally:
        for task in tasks:
            task.kill()
            task.wait()


async def test_a_lazy_dump_may_not_serve_pages_by_itself(tmp_path: Path, lazy: Hook) -> None:
    assert await exit_status(begin(tmp_path, "status-ready")) == 1


async def test_the_configuration_is_one_option_a_line(hook: Hook, tmp_path: Path) -> None:
    assert hook.config.read_text().splitlines()[-1] == f"action-script {script(tmp_path)}"


@pytest.mark.parametrize("half", ["", '{"at":1,"kind":"phase","phase":"COMM'])
async def test_what_the_journal_got_while_it_was_read_counts(
    tmp_path: Path, hook: Hook, journal: Journal, half: str
) -> None:
    """A line of which the script had seen a part when it began to wait."""
    with journal.path.open("a") as file:
        file.write(half)
        file.flush()
        process = await standing(hook, tmp_path, POST_DUMP)
        file.write((half and 'ITTED"}') or '{"at":1,"kind":"phase","phase":"COMMITTED"}')
        file.write("\n")
    hook.release(POST_DUMP)
    assert await exit_status(process) == 0


HOLDER = """
import asyncio, sys
from pathlib import Path
from coordinator.agent.hook import Hook

async def hold():
    Hook(Path(sys.argv[1]), Path(sys.argv[2]), ("pre-dump", "post-dump", "post-restore"), lazy=False)
    print("held", flush=True)
    sys.stdin.read()

asyncio.run(hold())
"""


@pytest.fixture
def holder(tmp_path: Path, journal: Journal) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the hook, as an agent does."""
    folder = script(tmp_path).parent
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(journal.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("action", "phase", "status"),
    [
        (POST_DUMP, "nothing", 1),
        (POST_DUMP, "aborted", 1),
        (POST_DUMP, "committed", 0),
        (PRE_DUMP, "nothing", 1),
        (POST_RESTORE, "committed", 0),
        (POST_RESTORE, "aborted", 1),
    ],
)
async def test_when_its_holder_is_killed_it_follows_the_journal(  # noqa: PLR0917
    tmp_path: Path, holder: subprocess.Popen[bytes], journal: Journal, action: str, phase: str, status: int
) -> None:
    reached = os.open(script(tmp_path).parent / "reached", os.O_RDWR | os.O_NONBLOCK)
    process = begin(tmp_path, action)
    await asyncio.to_thread(select.select, [reached], [], [], 20)
    assert os.read(reached, 100).decode().split() == [action]
    os.close(reached)
    record(journal, phase)
    assert process.poll() is None
    holder.kill()
    assert await exit_status(process) == status


def test_tar_as_criu_calls_it_packs_and_unpacks_without_compressing(hook: Hook, tmp_path: Path) -> None:
    """The arguments are those of criu/filesystems.c, tmpfs_dump and tmpfs_restore."""
    (tmp_path / "from/a b").mkdir(parents=True)
    (tmp_path / "from/a b/file").write_text("content")
    (tmp_path / "to").mkdir()
    archive = tmp_path / "archive"
    path = {**os.environ, "PATH": f"{hook.programs}:{os.environ['PATH']}"}
    options = ("--no-unquote", "--no-wildcards")
    with archive.open("wb") as image:
        packing = ("tar", "--create", "--gzip", *options, "--sparse", "--directory", str(tmp_path / "from"), ".")
        subprocess.run(packing, env=path, stdout=image, check=True)
    assert not archive.read_bytes().startswith(b"\x1f\x8b")
    with archive.open("rb") as image:
        unpacking = ("tar", "--extract", "--gzip", *options, "--directory", str(tmp_path / "to"))
        subprocess.run(unpacking, env=path, stdin=image, check=True)
    assert (tmp_path / "to/a b/file").read_text() == "content"
