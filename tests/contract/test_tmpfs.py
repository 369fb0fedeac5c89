"""A tmpfs of a real process in a mount namespace of its own: what is known of its files, and what another becomes."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.agent.memory import file_events
from coordinator.agent.memory.base import PAGE_BYTES
from coordinator.agent.memory.filling import StoredMemory
from coordinator.agent.memory.tmpfs_source import OwnTmpfs
from coordinator.agent.memory.tree import TreeTracker
from coordinator.agent.memory.write_protect import WriteProtectTracker
from coordinator.agent.messages import ChannelMessage
from coordinator.errors import RestoreFailed, TrackingFailed
from tests.contract.memory_target import CHOICE, Target

PAGES = 512
#: A mount of its own, and a large file there, mapped and closed.
PROGRAM = f"""
CLONE_NEWNS, MS_REC, MS_PRIVATE, MNT_DETACH, PAGES = 0x20000, 0x4000, 1 << 18, 2, {PAGES}
assert libc.unshare(CLONE_NEWNS) == 0
assert libc.mount(b'none', b'/', None, MS_REC | MS_PRIVATE, None) == 0
# Copies of other tests' mounts, and of labs': once those are gone, they would be this namespace's alone.
for line in open('/proc/self/mountinfo').readlines():
    point, kind = line.split()[4], line.partition(' - ')[2].split()[0]
    if kind == 'tmpfs' and not (SHM + '/').startswith(point.rstrip('/') + '/'):
        libc.umount2(point.encode(), MNT_DETACH)
os.mkdir(SHM)
assert libc.mount(b'shm', SHM.encode(), b'tmpfs', 0, b'size=64m,mode=1777') == 0
os.chdir(SHM)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
def large(name, pages=PAGES):
    fd = os.open(name, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, pages * PAGE)
    return fd
def with_content(name, size):
    fd = large(name)
    os.pwrite(fd, b'z' * size, 0)
    os.ftruncate(fd, size)
    os.close(fd)
def opened(do, how=os.O_RDWR):
    fd = os.open('mapped', how)
    do(fd)
    os.close(fd)
def pass_by(fd, page, value):
    there = area(PAGES, SHARED, fd)
    ctypes.string_at(there + page * PAGE, 1)  # from here on no fault tells of a write
    put(there + page * PAGE, value)
    libc.munmap(there, PAGES * PAGE)
fd = large('mapped')
start = area(PAGES, SHARED, fd)
os.close(fd)
put(start, 1, PAGES)
"""


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    if CHOICE.name != "write_protect":
        pytest.skip(CHOICE.reason)
    # The target is a child of ours, which a workload is not.
    monkeypatch.setattr(file_events, "is_ours", lambda pid: pid == os.getpid())
    with Target() as made:
        made.run(f"globals().update(SHM={str(tmp_path / 'own')!r})")
        made.run(f"exec({PROGRAM!r}, globals())")
        yield made


class Link:
    """A channel whose other end is the memory of a destination."""

    def __init__(self, memory: StoredMemory) -> None:
        self._memory = memory

    async def send(self, message: ChannelMessage, payload: bytes = b"") -> None:
        assert self._memory.take(message, payload)


class Looks:
    """Looks at a target, and sends what they find to another tmpfs."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.here = Path(f"/proc/{target.pid}/root{folder}/own")
        self.there = folder / "tmpfs-0"
        self.tree = TreeTracker(target.pid, WriteProtectTracker)
        self.tmpfs = OwnTmpfs(target.pid)
        self.memory = StoredMemory()
        self.memory._work = folder
        self._link: Any = Link(self.memory)

    def look(self, *, last: bool = False, fixed: bool = False) -> int:
        """How many pages the destination does not have."""
        self.tmpfs.begin(last=last, fixed=fixed)
        answers = self.tree.collect(last=last, files=self.tmpfs.known)
        self.tmpfs.take(answers.values(), last=last)
        return self.tmpfs.dirty_bytes // PAGE_BYTES

    def round(self, *, fixed: bool = False) -> int:
        found = self.look(fixed=fixed)
        asyncio.run(self.tmpfs.send(self._link))
        return found

    def settle(self) -> None:
        """Look until nothing is dirty any more."""
        while self.round():
            pass

    def complete(self) -> int:
        """The last look, and whether the other tmpfs is the same then."""
        found = self.look(last=True)
        asyncio.run(self.tmpfs.send(self._link))
        asyncio.run(self.tmpfs.complete(self._link))
        assert contents(self.there) == contents(self.here)
        return found


@pytest.fixture
def looks(target: Target, tmp_path: Path) -> Iterator[Looks]:
    made = Looks(target, tmp_path)
    yield made
    made.tree.close()
    made.tmpfs.close()
    asyncio.run(made.memory.close())
    for each in tmp_path.glob("tmpfs-*"):
        subprocess.run(["umount", "--lazy", each], check=True)


def contents(root: Path) -> dict[str, tuple[Any, ...]]:
    """Everything that is in a tmpfs, and what somebody who looks at it can see."""
    found = {}
    for path in (root, *root.rglob("*")):
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFSOCK:
            continue
        content = path.read_bytes() if kind == stat.S_IFREG else path.readlink() if kind == stat.S_IFLNK else b""
        links = {str(each.relative_to(root)) for each in root.rglob("*") if each.lstat().st_ino == status.st_ino}
        attributes = {name: os.getxattr(path, name, follow_symlinks=False) for name in _attributes(path)}
        size = status.st_size if kind != stat.S_IFDIR else 0
        seen = (status.st_mode, status.st_uid, status.st_gid, size, status.st_mtime_ns, status.st_rdev)
        found[str(path.relative_to(root))] = (*seen, content, links, attributes)
    return found


def _attributes(path: Path) -> list[str]:
    return os.listxattr(path, follow_symlinks=False)


def test_a_mapped_file_is_told_page_for_page(target: Target, looks: Looks) -> None:
    assert looks.round() == PAGES
    assert looks.round() == 0
    target.run("put(start + 3 * PAGE, 7)")
    assert looks.round() == 1
    assert looks.round() == 0
    target.run("put(start + 5 * PAGE, 7)")
    assert looks.complete() == 1


PAST_THE_MAPPING = {
    "write": "opened(lambda fd: os.pwrite(fd, b'x' * 9, 3 * PAGE))",
    "write-only": "opened(lambda fd: os.pwrite(fd, b'x' * 9, 3 * PAGE), os.O_WRONLY)",
    "odd-size": "with_content('odd', PAGES * PAGE - 5)",
    "append": "opened(lambda fd: os.write(fd, b'x' * PAGE), os.O_WRONLY | os.O_APPEND)",
    "shorter": "opened(lambda fd: os.ftruncate(fd, 300 * PAGE + 7))",
    "shorter-and-longer": "opened(lambda fd: (os.ftruncate(fd, PAGE), os.ftruncate(fd, PAGES * PAGE)))",
    "fallocate": "opened(lambda fd: os.posix_fallocate(fd, 0, 2 * PAGES * PAGE))",
    "hole": "opened(lambda fd: libc.fallocate(fd, 3, 8 * PAGE, 8 * PAGE))",
    "hole-by-mapping": "libc.madvise(start + 8 * PAGE, 4 * PAGE, 9)",
    "sendfile": "opened(lambda fd: os.sendfile(fd, os.open('/proc/self/exe', os.O_RDONLY), 0, 5 * PAGE))",
    "mapped-anew": "opened(lambda fd: pass_by(fd, 9, 5))",
    "dropped": "(put(start + 9 * PAGE, 5), libc.madvise(start, PAGES * PAGE, 4))",
    "unmapped": "(put(start + 9 * PAGE, 5), libc.munmap(start + 8 * PAGE, 4 * PAGE))",
}


@pytest.mark.parametrize("how", PAST_THE_MAPPING)
def test_what_no_page_table_tells_is_told(target: Target, looks: Looks, how: str) -> None:
    looks.settle()
    target.run(PAST_THE_MAPPING[how])
    assert looks.complete() > 0


def test_what_is_written_through_a_mapping_between_two_looks_is_found_by_comparing(
    target: Target, looks: Looks
) -> None:
    target.run("globals().update(kept=os.open('mapped', os.O_RDWR))")
    looks.settle()
    target.run("pass_by(kept, 11, 9)")
    assert looks.round() == 0
    assert looks.round(fixed=True) == 1
    target.run("(pass_by(kept, 12, 8), put(start + 20 * PAGE, 5), os.close(kept))")
    assert looks.complete() == 2


def test_once_it_can_be_written_to_unseen_it_is_sent_again_with_digests(target: Target, looks: Looks) -> None:
    looks.settle()
    target.run("globals().update(kept=os.open('mapped', os.O_RDWR))")
    assert looks.round() == PAGES
    target.run("os.pwrite(kept, b'xyz', 7 * PAGE)")
    assert looks.round() == 0
    target.run("os.pwrite(kept, b'xyz', 9 * PAGE)")
    assert looks.complete() == 2


def test_a_descriptor_that_only_writes_maps_nothing(target: Target, looks: Looks) -> None:
    target.run("globals().update(kept=os.open('mapped', os.O_WRONLY))")
    looks.settle()
    target.run("put(start, 7)")
    assert looks.complete() == 1


def test_somebody_outside_has_it_mapped(target: Target, looks: Looks) -> None:
    with (looks.here / "mapped").open("r+b", buffering=0) as file, mmap.mmap(file.fileno(), 0) as theirs:
        looks.settle()
        theirs[5 * PAGE_BYTES] = 9
        assert looks.round() == 0
        theirs[6 * PAGE_BYTES] = 9
    assert looks.complete() == 2


def test_a_child_that_came_and_went(target: Target, looks: Looks) -> None:
    looks.settle()
    target.run("exec('pid = os.fork()\\nif not pid:\\n put(start + 7 * PAGE, 3)\\n os._exit(0)\\nos.waitpid(pid, 0)')")
    looks.complete()


def test_files_come_and_go(target: Target, looks: Looks) -> None:
    looks.settle()
    target.run("os.close(large('second', 2 * PAGES))")
    looks.round()
    target.run("opened(lambda fd: os.pwrite(fd, b'y', 0))")
    target.run("os.rename('second', 'third')")
    target.run("exec('other = large(\"fourth\")\\nput(area(PAGES, SHARED, other), 4, PAGES)')")
    looks.round()
    target.run("os.unlink('third')")
    looks.complete()
    assert sorted(each.name for each in looks.there.iterdir()) == ["fourth", "mapped"]


def test_everything_that_is_not_large(target: Target, looks: Looks) -> None:
    target.run("exec('import socket; left = socket.socket(socket.AF_UNIX); left.bind(\"socket\")', globals())")
    for made in (
        "os.makedirs('a/b/c', 0o710)",
        "os.mkdir('empty', 0o2750)",
        "open('a/b/small', 'wb').write(bytes(range(256)) * 70)",
        "open('a/none', 'w').close()",
        "os.link('a/b/small', 'a/again')",
        "os.link('mapped', 'a/b/c/mapped')",
        "os.symlink('/nowhere', 'a/link')",
        "os.link('a/link', 'a/b/link', follow_symlinks=False)",
        "os.mkfifo('fifo', 0o622)",
        "os.mknod('null', 0o020666, os.makedev(1, 3))",
        "os.setxattr('a/b/small', 'trusted.name', b'\\0value')",
        "os.chown('a/b/small', 7, 8)",
        "os.chmod('a/b/small', 0o4711)",
        "os.chown('a/link', 9, 9, follow_symlinks=False)",
        "os.utime('a/b', ns=(1_000_000_007, 2_000_000_009))",
        "os.truncate('a/none', 1000)",
        "open('umlaut-\\xe4', 'w').write('x')",
        "open(b'no-text-\\xff', 'w').write('x')",
        "os.chmod('.', 0o1755)",
    ):
        target.run(f"exec({made!r})")
    looks.round()
    looks.complete()
    assert not (looks.there / "socket").exists()  # whoever has it bound will bind it again


def test_the_room_is_what_it_was(target: Target, looks: Looks) -> None:
    looks.settle()
    room = os.statvfs(looks.there).f_blocks
    looks.complete()
    assert os.statvfs(looks.there).f_blocks == room // 2 == os.statvfs(looks.here).f_blocks


def test_a_mount_below_or_above_is_noticed(target: Target, looks: Looks) -> None:
    looks.settle()
    target.run("os.mkdir('below')")
    assert target.run("libc.mount(b'more', b'below', b'tmpfs', 0, None)") == 0
    with pytest.raises(TrackingFailed, match="own"):
        looks.look(last=True)


def test_what_is_many_and_small_is_left_to_criu(target: Target, looks: Looks) -> None:
    told = []
    for made in (
        "os.unlink('mapped')",
        "[open(str(number), 'w').close() for number in range(60)]",
        "os.close(large('sparse'))",
        "open('full', 'wb').write(bytes(1 << 20))",
    ):
        target.run(f"exec({made!r})")
        tmpfs = OwnTmpfs(target.pid)
        tmpfs.begin()
        told.append(tmpfs.external)
        tmpfs.close()
    ours = (f"mnt[{looks.there.parent}/own]:livemove-0",)
    assert told == [ours, (), (), ours]


def test_when_criu_was_told_no_other_mount_is_taken_on(target: Target, looks: Looks) -> None:
    target.run("exec('[open(str(number), \"w\").close() for number in range(60)]')")
    target.run("os.unlink('mapped')")
    looks.round()
    assert (looks.tmpfs.external, looks.memory.external) == ((), ())
    target.run("open('full', 'wb').write(bytes(1 << 20))")
    looks.tmpfs.begin(fixed=True)
    assert not looks.tmpfs.external
    looks.round()
    assert looks.memory.external == (f"mnt[livemove-0]:{looks.there}",)


def test_another_mount_than_ours_is_noticed_after_the_restore(target: Target, looks: Looks) -> None:
    looks.round()
    looks.complete()
    with pytest.raises(RestoreFailed, match="own"):
        looks.memory._tmpfs.check(target.pid)


def test_anything_at_any_time(target: Target, looks: Looks) -> None:
    """Looks fall between any two of many changes, and the last one makes both the same."""
    chosen = random.Random(1)
    target.run("globals().update(kept=large('kept'))")
    ways = [
        *(PAST_THE_MAPPING[how] for how in ("write", "hole", "hole-by-mapping", "sendfile", "mapped-anew")),
        "put(start + {page} * PAGE, {value}, 3)",
        "pass_by(kept, {page}, {value})",
        "os.pwrite(kept, b'{value}' * 3000, os.fstat(kept).st_size)",
        "os.pwrite(kept, b'{value}', {page} * PAGE)",
        "os.rename('kept', 'kept-{value}') if os.path.exists('kept') else 0",
        "open('small-{page}', 'w').write('{value}')",
    ]
    for number in range(300):
        page, value = chosen.randrange(PAGES - 3), chosen.randrange(1, 99)
        target.run(chosen.choice(ways).format(page=page, value=value))
        if number % 7 == 0:
            looks.round(fixed=number % 3 == 0)
    looks.complete()
