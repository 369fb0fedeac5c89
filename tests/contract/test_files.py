"""Copying files with the real rsync, between two directories of this machine, with a service that writes meanwhile."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coordinator.agent.files.left_over import LeftOver
from coordinator.errors import FilesNotCopied
from labs.programs.bookkeeper import ACL, fill
from tests.contract.two_trees import Two, links, replace
from tests.integration.faults import until


@contextmanager
def process(argv: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(argv) as running:
        try:
            yield running
        finally:
            running.kill()


async def test_everything_arrives(two: Two) -> None:
    fill(two.here)
    await two.copied()
    await two.last()
    two.check_equal()
    assert (two.there / "sparse").stat().st_blocks < 100
    assert frozenset({"plain", "folder/linked"}) in links(two.there)
    *under_way, (_, sent, total) = two.told
    assert sent == total > (two.here / "plain").stat().st_size
    assert [each for each in under_way if each[0] != "files" or not 0 < each[1] <= sent or each[2]] == []
    two.source.check_untouched()
    assert await two.close() == []


def _rename_folder(root: Path) -> None:
    (root / "folder").rename(root / "other")
    (root / "other/below/new").write_text("in a directory that was renamed")


def _replace_folder(root: Path) -> None:
    shutil.rmtree(root / "folder/below")
    (root / "folder").rename(root / "f")
    (root / "folder").mkdir()


def _remove_files(root: Path) -> None:
    for each in (root / "folder").iterdir():
        if each.is_file():
            each.unlink()


def _part(root: Path) -> None:
    (root / "folder/linked").unlink()
    (root / "folder/linked").write_text("alone")


def _same_size_and_time(root: Path) -> None:
    (root / "owned").write_text("y")
    os.utime(root / "owned", ns=(5, 5))


def _new_tree(root: Path) -> None:
    (root / "a/b/c").mkdir(parents=True)
    (root / "a/b/c/file").write_text("x")
    (root / "a/b/c/file").chmod(0o640)


def _through_a_mapping(root: Path) -> None:
    with (root / "plain").open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[1000:1004] = b"abcd"


def _swap_kinds(root: Path) -> None:
    shutil.rmtree(root / "folder")
    (root / "folder").write_text("was a directory")
    (root / "plain").unlink()
    (root / "plain").mkdir()
    (root / "plain/x").write_text("was a file")


CHANGES: dict[str, Callable[[Path], object]] = {
    "longer": lambda root: os.truncate(root / "owned", 100_000),
    "one of two names": lambda root: (root / "folder/linked").write_bytes(b"both"),
    "another name": lambda root: os.link(root / "plain", root / "folder/below/third"),
    "parted": _part,
    "a directory gone": lambda root: shutil.rmtree(root / "folder"),
    "a directory renamed": _rename_folder,
    "replaced": replace,
    "a new tree": _new_tree,
    "through a mapping": _through_a_mapping,
    "kinds": _swap_kinds,
    "same size and time": _same_size_and_time,
    "a directory replaced": _replace_folder,
    "mode of the root": lambda root: root.chmod(0o700),
    "attribute gone": lambda root: os.removexattr(root / "owned", "user.colour"),
    "list": lambda root: os.setxattr(root / "plain", "system.posix_acl_access", ACL),
    "odd names": _remove_files,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
async def test_the_last_pass_sends_what_has_changed_without_looking_at_the_rest(two: Two, change: str) -> None:
    fill(two.here)
    os.utime(two.here / "owned", ns=(5, 5))
    await two.copied()
    before = len(two.passes)
    CHANGES[change](two.here)
    await two.source.last(os.getpid(), two.channel)
    two.check_equal()
    assert len(two.passes) == before + 1
    assert "--delete-missing-args" in two.passes[-1]


async def test_what_is_mapped_in_the_freeze_is_compared_whatever_its_times_say(two: Two) -> None:
    (two.here / "mapped").write_bytes(bytes(1 << 20))
    with (two.here / "mapped").open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[5] = 1
        await two.copied()
        os.utime(two.here / "mapped", ns=(7, 7))
        await two.source.catch_up(os.getpid(), two.channel)
        memory[5] = 2
        assert (two.here / "mapped").stat().st_mtime_ns == 7
        await two.source.last(os.getpid(), two.channel)
    two.check_equal()
    assert (two.there / "mapped").read_bytes()[5] == 2


async def test_a_service_that_writes_all_the_time(two: Two) -> None:
    fill(two.here)
    script = """if True:
        import os, shutil, sys
        from pathlib import Path
        root, n = Path(sys.argv[1]), 0
        log = (root / "log").open("ab", buffering=0)
        while True:
            n += 1
            log.write(b"%d\\n" % n)
            (root / "new").write_text(str(n)); (root / "new").rename(root / "current")
            os.makedirs(root / f"d{n % 7}/e", exist_ok=True); (root / f"d{n % 7}/e/{n % 50}").write_text(str(n))
            shutil.rmtree(root / f"r{n % 5}", ignore_errors=True)
            if n % 11 == 0: (root / f"d{n % 7}").rename(root / f"r{n % 5}")
    """
    with process([sys.executable, "-c", script, str(two.here)]) as writer:
        await two.copied()
        await two.source.catch_up(writer.pid, two.channel)
        writer.send_signal(signal.SIGSTOP)
        until(lambda: Path(f"/proc/{writer.pid}/stat").read_text().rpartition(") ")[2][0] == "T", "a stop")
        await two.source.last(writer.pid, two.channel)
        two.check_equal()
        two.source.check_untouched()


async def test_what_was_made_is_removed_and_what_was_there_is_kept(two: Two) -> None:
    fill(two.here)
    before = two.target.look()
    await two.copied()
    await two.target.remove(before)
    await two.target.remove(before)
    assert not (two.folder / "there").exists()

    two.there.mkdir(parents=True)
    two.there.chmod(0o710)
    before = two.target.look()
    await two.close()
    await two.copied()
    await two.target.remove(before)
    assert (list(two.there.iterdir()), two.there.stat().st_mode & 0o777) == ([], 0o710)

    (two.there / "somebody's").touch()
    with pytest.raises(FilesNotCopied, match="was not left there by a move"):
        two.target.look()
    LeftOver(two.folder / "state", "w").remember([two.there])
    await two.target.remove(two.target.look())
    assert (two.there / "somebody's").exists()
    two.target.claim()
    with pytest.raises(FilesNotCopied):
        two.target.look()
