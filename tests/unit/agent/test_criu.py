"""`HeldCriu` over a shell script that runs the hook at the stages where CRIU does."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.agent.criu import HeldCriu, Restore
from coordinator.agent.images import InventoryHold
from coordinator.agent.process import Command, wait_gone
from coordinator.errors import CommandFailed, DumpFailed, RestoreFailed
from coordinator.journal import Journal, Phase
from tests.unit.agent.test_terminals import terminal, terminals, tree

_SCRIPT = """
at() { CRTOOLS_SCRIPT_ACTION=$1 "$(sed -n 's/^action-script //p' "$CRIU_CONFIG_FILE")"; }
"""
DUMP = _SCRIPT + "at pre-dump || exit 3; at network-lock; at post-dump || exit 4"
RESTORE = (
    _SCRIPT
    + "read -r first <$IMAGES/inventory.img || exit 2; at pre-restore; at post-restore || exit 5; at pre-resume;"
    + "at post-resume"
)
FAILING = "echo 'Warn: x'; echo 'Error (a.c:1): no such file'; exit 1"


def script(text: str) -> Command:
    return Command(("sh", "-c", text), {})


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = Journal.create(tmp_path, "m-1", "source", {})
    yield made
    made.close()


@pytest.fixture
def criu(tmp_path: Path) -> HeldCriu:
    (tmp_path / "work").mkdir()
    (tmp_path / "images").mkdir()
    return HeldCriu(tmp_path / "work", tmp_path / "images")


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InventoryHold:
    monkeypatch.setenv("IMAGES", str(tmp_path))
    (tmp_path / "aside").write_text("inventory\n")
    return InventoryHold(tmp_path / "inventory.img", tmp_path / "aside")


def commit(journal: Journal) -> None:
    for phase in list(Phase)[1:8]:
        journal.enter(phase)


@pytest.mark.parametrize("committed", [True, False])
async def test_a_dump_stops_before_the_freeze_and_after_it(criu: HeldCriu, journal: Journal, committed: bool) -> None:
    pids: list[int] = []
    dump = await criu.dump(script(DUMP), journal.path, pids.append, root_pid=os.getpid(), lazy=False)
    assert len(pids) == 1
    await dump.ready()
    dump.freeze()
    await dump.dumped()
    if committed:
        commit(journal)
    await dump.end()
    await dump.end()
    dump.let_go()


async def test_a_dump_that_is_let_go_before_the_freeze_gives_up(criu: HeldCriu, journal: Journal) -> None:
    frozen = journal.path.parent / "frozen"
    dump = await criu.dump(
        script(DUMP.replace("at network-lock", f"touch {frozen}")),
        journal.path,
        lambda _: None,
        root_pid=os.getpid(),
        lazy=False,
    )
    await dump.ready()
    dump.let_go()
    await dump.end()
    assert not frozen.exists()


def sleeping() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "1000"])


async def begun(criu: HeldCriu, journal: Journal, hold: InventoryHold, text: str = RESTORE) -> Restore:
    restore = await criu.restore(script(text), journal.path, lambda _: None, hold, lazy=False)
    restore.begin()
    await restore.staged()
    return restore


async def test_a_restore_runs_when_it_is_committed(criu: HeldCriu, journal: Journal, hold: InventoryHold) -> None:
    restore = await begun(criu, journal, hold)
    commit(journal)
    await restore.end()


async def test_sockets_take_packets_before_the_tasks_run_and_those_run_before_criu_has_ended(
    criu: HeldCriu, journal: Journal, hold: InventoryHold, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    waits = f"read line <{gate}"
    text = RESTORE.replace("at post-resume", f"{waits}; at post-resume; {waits}")
    restore = await begun(criu, journal, hold, text)
    commit(journal)
    for reached in (restore.connected, restore.resumed):
        await reached()
        with gate.open("w") as file:
            file.write("go on\n")
    await restore.end()


@pytest.mark.parametrize("stage", ["pre-resume", "post-resume"])
async def test_tasks_that_do_not_run_are_told(
    criu: HeldCriu, journal: Journal, hold: InventoryHold, stage: str
) -> None:
    restore = await begun(criu, journal, hold, RESTORE.replace(f"at {stage}", "exit 7"))
    commit(journal)
    with pytest.raises(RestoreFailed, match="exit status 7"):
        await restore.connected()
        await restore.resumed()


async def test_a_restore_that_is_aborted_fails_as_it_should(
    criu: HeldCriu, journal: Journal, hold: InventoryHold
) -> None:
    restore = await begun(criu, journal, hold)
    journal.enter(Phase.ABORTED)
    await restore.end()


async def test_criu_reads_no_images_before_they_are_complete(
    criu: HeldCriu, journal: Journal, hold: InventoryHold, tmp_path: Path
) -> None:
    """Also when its agent lets go of it: then the restore ends without having begun."""
    touched = tmp_path / "touched"
    text = RESTORE.replace("at pre-restore", f"touch {touched}")
    restore = await criu.restore(script(text), journal.path, lambda _: None, hold, lazy=False)
    restore.let_go()
    await restore.end()
    assert not touched.exists()


async def test_a_restore_that_fails_after_the_commit_point_is_an_error(
    criu: HeldCriu, journal: Journal, hold: InventoryHold
) -> None:
    restore = await begun(criu, journal, hold, RESTORE + "; exit 7")
    commit(journal)
    with pytest.raises(RestoreFailed, match="exit status 7"):
        await restore.end()


async def test_a_lazy_dump_kills_the_frozen_tasks_on_a_commit(criu: HeldCriu, journal: Journal) -> None:
    """CRIU itself does not: it would serve their pages first."""
    with sleeping() as task:
        text = DUMP.replace("at post-dump", f"CRTOOLS_INIT_PID={task.pid}; export CRTOOLS_INIT_PID; at post-dump")
        dump = await criu.dump(script(text), journal.path, lambda _: None, root_pid=os.getpid(), lazy=True)
        await dump.ready()
        dump.freeze()
        await dump.dumped()
        assert task.poll() is None
        commit(journal)
        await dump.end()
        assert await asyncio.to_thread(task.wait, 20) == -9


async def test_a_terminal_in_nobodys_hands_is_as_it_can_be_restored_when_a_dump_is_complete(
    criu: HeldCriu, journal: Journal, tmp_path: Path
) -> None:
    shell, job = 100, 300
    for name, image in (("pstree", tree((shell, shell, shell))), ("tty-info", terminals(terminal(shell, job)))):
        (tmp_path / f"{name}.img").write_bytes(image)
    text = DUMP.replace("at post-dump", f"cp {tmp_path}/*.img {tmp_path}/images/; at post-dump")
    dump = await criu.dump(script(text), journal.path, lambda _: None, root_pid=os.getpid(), lazy=False)
    await dump.ready()
    dump.freeze()
    await dump.dumped()
    assert (tmp_path / "images/tty-info.img").read_bytes() == terminals(terminal(shell, shell))
    await dump.end()


async def test_a_failure_is_told_with_its_first_explaining_line(criu: HeldCriu, journal: Journal) -> None:
    dump = await criu.dump(script(FAILING), journal.path, lambda _: None, root_pid=os.getpid(), lazy=False)
    with pytest.raises(DumpFailed, match=r"exit status 1: Error \(a.c:1\): no such file"):
        await dump.ready()


async def test_what_cannot_be_started_is_told(criu: HeldCriu, journal: Journal) -> None:
    with pytest.raises(CommandFailed, match="/nonexistent"):
        await criu.dump(Command(("/nonexistent",), {}), journal.path, lambda _: None, root_pid=os.getpid(), lazy=False)


async def test_cancelled_while_it_starts_it_is_known_and_follows_the_journal(
    criu: HeldCriu, journal: Journal, hold: InventoryHold
) -> None:
    """Otherwise the roll-back would not wait for a restore that is about to hold tasks."""
    from coordinator.agent.process import start_time

    known: list[tuple[int, int]] = []
    starting = asyncio.ensure_future(
        criu.restore(
            script(RESTORE),
            journal.path,
            lambda pid: known.append((pid, start_time(pid) or 0)),
            hold,
            lazy=False,
        )
    )
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    ((pid, started),) = known
    journal.enter(Phase.ABORTED)
    assert await wait_gone(pid, started, 20)
