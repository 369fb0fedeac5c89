"""A program under CRIU's filter sees a shared object that is to be hidden as empty, and every other as it is."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from coordinator.agent.criu_filter import CriuFilter
from coordinator.agent.memory.base import PAGE_BYTES
from coordinator.agent.memory.hidden_pages import HiddenPages
from coordinator.agent.process import Command, start
from tests.contract.memory_target import Target

ROOT = Path(__file__).parents[2]
#: As CRIU does (criu/shmem.c, do_dump_one_shmem): opens the image, and asks where files have data.
SEEKING = """
import os, sys
from pathlib import Path
image, *paths = sys.argv[1:]
Path(image).with_name("go").read_bytes()
Path(image).write_bytes(b"")
def data(path):
    file = os.open(path, os.O_RDONLY)
    try:
        return os.lseek(file, 0, os.SEEK_DATA), os.lseek(file, 0, os.SEEK_END)
    except OSError as error:
        return error.errno
print([data(path) for path in paths])
"""
OBJECTS = """
def made(pages):
    fd = os.memfd_create('m')
    os.ftruncate(fd, pages * PAGE)
    os.pwrite(fd, b'x', PAGE)
    return fd
hidden, seen = made(4), made(5)
area(4, SHARED, hidden)
"""


async def test_a_hidden_object_has_no_data(target: Target, tmp_path: Path) -> None:
    target.run(f"exec({OBJECTS!r}, globals())")
    numbers = target.run("hidden"), target.run("seen")
    paths = [f"/proc/{target.pid}/fd/{number}" for number in numbers]
    plain = tmp_path / "a file"
    plain.write_bytes(b"x")
    inode = target.run("os.fstat(hidden).st_ino")
    hidden = HiddenPages(target.pid, objects=[inode, plain.stat().st_ino])
    os.mkfifo(tmp_path / "go")
    words = (str(tmp_path / f"pagemap-shmem-{inode}.img"), *paths, str(plain), paths[0])
    running = await start(Command((sys.executable, "-c", SEEKING, *words), {}), tmp_path / "said")
    over = CriuFilter(target.pid, hidden, tmp_path)
    over.arm(running.pid)
    await asyncio.to_thread((tmp_path / "go").write_bytes, b"")
    assert await running.wait() == 0, (tmp_path / "said").read_text()
    assert await asyncio.to_thread(over.wait, 10)
    over.close()
    # The file has the number of one that is hidden, and another device. Asked again, the kernel answers.
    no_data, others = 6, [(PAGE_BYTES, 5 * PAGE_BYTES), (0, 1), (PAGE_BYTES, 4 * PAGE_BYTES)]
    assert (tmp_path / "said").read_text().strip() == str([no_data, *others])
    assert list(hidden.objects) == [inode]
    assert not hidden.refusal
