"""Copying files with the real rsync where it goes wrong: it breaks off, has no room, events are lost, others write."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

import pytest

from coordinator.agent.files import source as source_module
from coordinator.agent.files.rsync import STREAM_BROKEN
from coordinator.agent.messages import SyncBegin
from coordinator.errors import FilesChanged, FilesNotCopied, ProtocolError
from labs.programs.bookkeeper import fill
from tests.contract.two_trees import Two, replace

#: Documentation/admin-guide/sysctl/fs.rst
EVENTS_KEPT = Path("/proc/sys/fs/fanotify/max_queued_events")


@contextmanager
def small(path: Path) -> Iterator[None]:
    """A file system of 1 MiB at that path."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


@contextmanager
def rsync_that_breaks_off(times: int) -> Iterator[None]:
    """The sender's, so many times, at the end of its pass."""
    folder = Path(mkdtemp())
    (folder / "left").write_text("x" * times)
    script = f"""#!/bin/sh
case "$*" in *--server*) exec {shutil.which("rsync")} "$@" ;; esac
{shutil.which("rsync")} "$@" || exit
[ -s {folder}/left ] || exit 0
truncate -s -1 {folder}/left
exit {STREAM_BROKEN}
"""
    (folder / "rsync").write_text(script)
    (folder / "rsync").chmod(0o755)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
            yield
    finally:
        shutil.rmtree(folder)


async def test_a_pass_that_breaks_off_is_made_again_while_the_service_runs(two: Two) -> None:
    fill(two.here)
    with rsync_that_breaks_off(2):
        await two.copied()
    replace(two.here)
    with rsync_that_breaks_off(2):
        await two.source.catch_up(os.getpid(), two.channel)
    await two.source.last(os.getpid(), two.channel)
    two.check_equal()


async def test_a_pass_that_always_breaks_off_or_does_so_in_the_freeze_is_an_error(two: Two) -> None:
    fill(two.here)
    with rsync_that_breaks_off(1000), pytest.raises(FilesNotCopied, match="rsync ended with 12"):
        await two.copied()
    assert len(two.passes) < 10
    await two.source.copy(two.channel, lambda *_: None)
    replace(two.here)
    with rsync_that_breaks_off(1), pytest.raises(FilesNotCopied, match="rsync ended with 12"):
        await two.source.last(os.getpid(), two.channel)


async def test_without_events_the_last_pass_looks_at_everything_and_says_so(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "fanotify_mark: not supported")

    monkeypatch.setattr(source_module, "Watch", refused)
    fill(two.here)
    await two.copied()
    replace(two.here)
    await two.source.last(os.getpid(), two.channel)
    two.check_equal()
    (warning,) = await two.close()
    assert "events are not to be had" in warning


async def test_after_more_events_than_the_kernel_keeps_the_last_pass_looks_at_everything_and_says_so(two: Two) -> None:
    fill(two.here)
    await two.copied()
    (two.here / "many").mkdir()
    for number in range(int(EVENTS_KEPT.read_text()) + 100):  # nobody reads them: the loop is ours
        (two.here / "many" / str(number)).touch()
    replace(two.here)
    await two.source.last(os.getpid(), two.channel)
    two.check_equal()
    two.source.check_untouched()
    (two.here / "owned").write_text("somebody else")
    with pytest.raises(FilesChanged, match="/owned was written to"):
        two.source.check_untouched()
    (warning,) = await two.close()
    assert "too many changed at once" in warning


async def test_a_file_that_changes_in_the_last_pass(two: Two) -> None:
    fill(two.here)
    await two.copied()
    (two.here / "plain").write_bytes(os.urandom(1 << 20))
    writing = asyncio.create_task(_when(two, lambda: (two.here / "owned").write_text("somebody else")))
    with pytest.raises(FilesChanged, match="/owned was written to while the service was frozen"):
        await two.source.last(os.getpid(), two.channel)
    await writing


async def _when(two: Two, act: Callable[[], object]) -> None:
    """Do something when the next pass has begun."""
    before = len(two.passes)
    while len(two.passes) == before:  # noqa: ASYNC110 - nothing tells
        await asyncio.sleep(0)
    act()


async def test_a_destination_that_cannot_take_it(two: Two) -> None:
    """A file system without room: the destination is a small tmpfs."""
    (two.here / "large").write_bytes(bytes(range(256)) * 16384)
    two.there.mkdir(parents=True)
    with small(two.there), pytest.raises(FilesNotCopied, match="No space left on device"):
        try:
            await two.copied()
        finally:
            await two.close()


async def test_no_rsync(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.agent.files.rsync._EVERYTHING", ("--no-such-option",))
    with pytest.raises(FilesNotCopied, match="unknown option"):
        await two.copied()


async def test_only_an_rsync_into_a_tree_is_started(two: Two) -> None:
    two.target.make()
    for arguments in (("peer", "sh", "--server", ".", "."), ("peer", "rsync", "--server", ".", "/etc")):
        with pytest.raises(ProtocolError, match="no rsync into a tree"):
            await two.target.receive(two.other, SyncBegin(tree=0, arguments=arguments))
    with pytest.raises(ProtocolError, match="number 1"):
        await two.target.receive(two.other, SyncBegin(tree=1, arguments=()))
