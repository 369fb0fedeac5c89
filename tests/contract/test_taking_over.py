"""A real process that restores a shared object finds ours, or one that holds the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coordinator.agent.memory.base import PAGE_BYTES, Mapping
from coordinator.agent.memory.mappings import read_mappings
from coordinator.agent.memory.ptrace import status_field
from coordinator.agent.memory.taking_over import ReceivedObjects
from coordinator.agent.messages import HandedOver
from coordinator.errors import RestoreFailed
from tests.contract import restoring_task
from tests.contract.memory_target import state, until

NAME, NUMBER, PAGES = "/dev/zero", -1, 8
SIZE, ADDRESS = PAGES * PAGE_BYTES - 100, 0x3000_0000_0000
#: A process that seizes another, says so, and waits in a call, as CRIU waits for its tasks.
TRACER = """
import ctypes, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
libc.prctl(1, 9)
sys.stdin.readline()
assert libc.ptrace(0x4206, int(sys.argv[1]), None, None) == 0
signal.signal(signal.SIGCHLD, lambda *_: None)
print('seized', flush=True)
while True:
    signal.pause()
"""


class Restored:
    """A process that restores an object of ``NAME``; ``traced``: by a process of its own."""

    def __init__(self, image: Path | None, *, traced: bool) -> None:
        argv = [
            sys.executable,
            restoring_task.__file__,
            NAME,
            str(SIZE),
            str(ADDRESS),
            *([str(image)] if image else []),
        ]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.tracer: subprocess.Popen[str] | None = None
        if traced:
            argv = [sys.executable, "-c", TRACER, str(self.process.pid)]
            self.tracer = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
            assert self.tracer.stdin is not None
            assert self.tracer.stdout is not None
            self.tracer.stdin.write("\n")
            assert self.tracer.stdout.readline() == "seized\n"

    def restore(self) -> int:
        """Have it restore; how many descriptors it has then."""
        self._say("")
        return int(self._hear())

    def read(self, offset: int) -> int:
        self._say(f"read {offset}")
        return int(self._hear())

    def write(self, offset: int, value: int) -> None:
        self._say(f"write {offset} {value}")
        self._hear()

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")

    def _hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@contextmanager
def restoring(image: Path | None, *, traced: bool = False) -> Iterator[Restored]:
    made = Restored(image, traced=traced)
    try:
        yield made
    finally:
        for process in (made.tracer, made.process):  # a process that has ended is its tracer's before it is ours
            if process is not None:
                process.kill()
                process.communicate()


@pytest.fixture
def objects() -> Iterator[ReceivedObjects]:
    """All pages but two came, of which one was dropped again."""
    made = ReceivedObjects()
    made.make(NUMBER, NAME, sealable=False)
    made.make(NUMBER, "another name", sealable=True)  # there is one
    for page in (0, 1, 2, 4, 5, 7):
        made.put(NUMBER, page * PAGE_BYTES, memoryview(bytes([page + 1]) * PAGE_BYTES))
    made.drop(NUMBER, 4 * PAGE_BYTES, 1)
    yield made
    made.close()
    made.close()


CONTENT = [1, 2, 3, 0, 0, 6, 0, 8]


def handed_over(restored: Restored, address: int = ADDRESS) -> HandedOver:
    return HandedOver(number=NUMBER, image="pagemap-shmem-7.img", size=SIZE, pid=restored.process.pid, address=address)


def mapped(restored: Restored) -> Mapping:
    (mapping,) = (each for each in read_mappings(restored.process.pid) if each.start == ADDRESS)
    return mapping


def content(restored: Restored) -> list[int]:
    return [restored.read(page * PAGE_BYTES) for page in range(PAGES)]


def test_what_came_can_be_read(objects: ReceivedObjects) -> None:
    assert [objects.read(NUMBER, page * PAGE_BYTES, 1)[0] for page in range(PAGES)] == CONTENT
    assert objects.read(NUMBER, 20 * PAGE_BYTES, 2) == bytes(2 * PAGE_BYTES)


@pytest.mark.parametrize("traced", [False, True])
def test_the_process_gets_ours_where_it_opens_the_image(objects: ReceivedObjects, tmp_path: Path, traced: bool) -> None:
    image = tmp_path / "pagemap-shmem-7.img"
    image.touch()
    with restoring(None) as plain:
        usual = plain.restore()
    with restoring(image, traced=traced) as restored:
        objects.complete(handed_over(restored))
        objects.arm(tmp_path)
        assert restored.restore() == usual
        mapping = mapped(restored)
        assert (mapping.name, mapping.permissions) == (f"/memfd:{NAME} (deleted)", "rw-s")
        assert content(restored) == CONTENT  # before anybody could have copied it
        assert objects.check(restored.process.pid) == ()
        assert mapped(restored) == mapping
        assert content(restored) == CONTENT
        restored.write(0, 9)
        assert content(restored) == [9, *CONTENT[1:]]
        tracer = restored.tracer.pid if restored.tracer is not None else 0
        assert int(status_field(restored.process.pid, "TracerPid")) == tracer
        until(lambda: state(restored.process.pid) == "S")


def test_elsewhere_its_own_comes_to_hold_the_same(objects: ReceivedObjects) -> None:
    """It opens no image, and has content of its own, of which nothing stays."""
    with restoring(None) as restored:
        restored.restore()
        restored.write(3 * PAGE_BYTES, 77)
        objects.complete(handed_over(restored))
        (said,) = objects.check(restored.process.pid)
        assert "were copied in the freeze" in said
        assert content(restored) == CONTENT


def test_an_object_that_was_not_restored_is_missed(objects: ReceivedObjects) -> None:
    with restoring(None) as restored:
        restored.restore()
        objects.complete(handed_over(restored, ADDRESS + PAGES * PAGE_BYTES))
        with pytest.raises(RestoreFailed, match="was not restored"):
            objects.check(restored.process.pid)
