"""Copying files with the real rsync, between two directories of this machine, with a service that writes meanwhile."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

import pytest

from coordinator.agent.fakes.channel import fake_channel
from coordinator.agent.files import source as source_module
from coordinator.agent.files.left_over import LeftOver
from coordinator.agent.files.looking import listing, walk
from coordinator.agent.files.rsync import STREAM_BROKEN
from coordinator.agent.files.source import SyncedFiles
from coordinator.agent.files.target import ReceivedFiles
from coordinator.agent.messages import SyncBegin
from coordinator.errors import FilesChanged, FilesNotCopied, ProtocolError
from coordinator.facts import Tree
from labs import root
from tests.integration.faults import until

_WRAPPER = """#!/bin/sh
exec {loader} --library-path {libraries} {root}/usr/bin/rsync "$@"
"""
#: An access control list (xattr of acl(5), version 2): owner rwx, user 1 rw, group r, mask rw, others nothing.
ACL = bytes.fromhex("0200000001000700ffffffff020006000100000004000400ffffffff10000600ffffffff20000000ffffffff")


@pytest.fixture(scope="module", autouse=True)
def rsync(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The lab's rsync, where this machine has none."""
    folder = tmp_path_factory.mktemp("bin")
    if shutil.which("rsync") is None:
        lab = root.ensure("base")
        (loader,) = lab.glob("usr/lib*/ld-linux-*.so.*")
        libraries = next(lab.glob("usr/lib/*-linux-gnu"))
        (folder / "rsync").write_text(_WRAPPER.format(loader=loader, libraries=libraries, root=lab))
        (folder / "rsync").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        yield


#: Documentation/admin-guide/sysctl/fs.rst
EVENTS_KEPT = Path("/proc/sys/fs/fanotify/max_queued_events")


@dataclass
class Two:
    """A tree on the "source", what becomes of it on the "destination", and the adapters between them."""

    folder: Path
    passes: list[tuple[str, ...]] = field(default_factory=list)
    told: list[tuple[str, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.here, self.there = self.folder / "here/tree", self.folder / "there/tree"
        self.here.mkdir(parents=True)
        for name in ("work-here", "work-there"):
            (self.folder / name).mkdir()
        self.source = SyncedFiles([self._tree(self.here)], LeftOver(self.folder, "w"), self.folder / "work-here")
        left_over = LeftOver(self.folder / "state", "w")
        self.target = ReceivedFiles([self._tree(self.there)], left_over, self.folder / "work-there")
        self.channel, self.other = fake_channel()
        self._serving: asyncio.Task[None] | None = None

    @staticmethod
    def _tree(path: Path) -> Tree:
        return Tree(path=str(path), inside=str(path), files="sync")

    def begin(self) -> None:
        self.target.make()
        self._serving = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        while True:
            message, _ = await self.other.receive()
            assert isinstance(message, SyncBegin), message
            self.passes.append(message.arguments)
            await self.target.receive(self.other, message)

    async def copied(self) -> None:
        self.begin()
        await self.source.copy(self.channel, lambda *told: self.told.append(told))

    async def last(self) -> None:
        await self.source.catch_up(os.getpid(), self.channel)
        await self.source.last(os.getpid(), self.channel)

    async def close(self) -> list[str]:
        warnings = self.source.close()
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait((self._serving,))
        return warnings

    def check_equal(self) -> None:
        assert listing(str(self.here)) == listing(str(self.there))
        assert times(self.here) == times(self.there)
        assert links(self.here) == links(self.there)


def times(root: Path) -> dict[str, int]:
    return {path: about.st_mtime_ns for path, about in walk(str(root))}


def links(root: Path) -> set[frozenset[str]]:
    names: dict[int, set[str]] = {}
    for path, about in walk(str(root)):
        names.setdefault(about.st_ino, set()).add(path)
    return {frozenset(each) for each in names.values()}


@pytest.fixture
async def two() -> Iterator[Two]:  # type: ignore[misc]
    """On a tmpfs: events of nobody else, and extended attributes."""
    folder = Path(mkdtemp(dir="/dev/shm", prefix="livemove-test-"))
    made = Two(folder)
    try:
        yield made
    finally:
        await made.close()
        shutil.rmtree(folder)


def fill(root: Path) -> None:
    """Everything that a file system can hold."""
    (root / "folder/below").mkdir(parents=True)
    (root / "folder").chmod(0o2751)
    (root / "plain").write_bytes(os.urandom(300_000))
    (root / "owned").write_text("x")
    os.chown(root / "owned", 1234, 5678)
    (root / "owned").chmod(0o4755)
    for name in ("#comment", ";comment", "-option", " space", "new\nline", os.fsdecode(b"\xff\xfe"), "*", "ä"):
        (root / "folder" / name).write_text(ascii(name))
    os.link(root / "plain", root / "folder/linked")
    (root / "link").symlink_to("/nowhere/at all")
    os.mkfifo(root / "pipe")
    os.mknod(root / "null", 0o20666, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(root / "socket"))
    with (root / "sparse").open("wb") as file:
        file.seek(50 << 20)
        file.write(b"end")
    os.setxattr(root / "owned", "user.colour", b"green")
    os.setxattr(root / "folder/below", "system.posix_acl_access", ACL)
    os.setxattr(root / "folder/below", "system.posix_acl_default", ACL)


@contextmanager
def process(argv: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(argv) as running:
        try:
            yield running
        finally:
            running.kill()


@contextmanager
def small(path: Path) -> Iterator[None]:
    """A file system of 1 MiB at that path."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


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


def _replace(root: Path) -> None:
    (root / "plain.new").write_text("new")
    (root / "plain.new").rename(root / "plain")


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
    "replaced": _replace,
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
    _replace(two.here)
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
    _replace(two.here)
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
    _replace(two.here)
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
    _replace(two.here)
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
