"""A program under the filter sees of page maps what it is to see, and the kernel answers the rest."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator.agent.criu_filter import CriuFilter, filter_program, put_under_filter
from coordinator.agent.memory.base import PAGE_BYTES
from coordinator.agent.memory.hidden_pages import HiddenPages
from coordinator.agent.memory.mappings import read_mappings
from coordinator.agent.memory.pagemap import PRESENT, WRITTEN
from coordinator.agent.memory.ptrace import status_field
from coordinator.agent.memory.runs import Spans, count_pages, difference, intersection, normalise
from coordinator.agent.process import Command, start
from tests.contract import scanner
from tests.contract.memory_target import Target, names, until

ROOT = Path(__file__).parents[2]
#: Three areas in a row, every other page of them written to; those named are of a file, and so in CRIU's images.
ROW = """
file = os.open('/var/tmp', os.O_TMPFILE | os.O_RDWR)
os.truncate(file, 64 * PAGE)
base = area(3 * 64)
for number in OF_FILE: area(64, PRIVATE | FIXED, file, base + number * 64 * PAGE)
for page in range(0, 3 * 64, 2): put(base + page * PAGE, 7)
"""
Scan = tuple[int, ...]


def row(target: Target, *of_file: int) -> tuple[int, int]:
    """Address of the first and after the last of three areas (see ``ROW``)."""
    target.run(f"exec({ROW.replace('OF_FILE', repr(of_file))!r}, globals())")
    begin = target.run("base")
    return begin, begin + 3 * 64 * PAGE_BYTES


def image(target: Target) -> str:
    """Where CRIU is held before it comes to the target's pages."""
    return f"pagemap-{target.pid}.img"


def scanning(folder: Path, target: Target, *scans: Scan, repeats: int = 1) -> Command:
    """A scanner that waits in its folder until it is let go."""
    os.mkfifo(folder / "go")
    words = (" ".join(map(str, each)) for each in scans)
    argv = (scanner.__file__, str(folder / image(target)), str(repeats), *words)
    return Command((sys.executable, *argv), {"PYTHONPATH": str(ROOT)})


async def let_go(folder: Path) -> None:
    await asyncio.to_thread((folder / "go").write_bytes, b"")


async def under_filter(target: Target, hidden: HiddenPages, folder: Path, *scans: Scan, repeats: int = 1) -> list[Any]:
    """What a scanner under the filter finds."""
    running = await start(scanning(folder, target, *scans, repeats=repeats), folder / "found")
    answering = CriuFilter(target.pid, hidden, folder)
    answering.arm(running.pid)
    await let_go(folder)
    assert await running.wait() == 0, (folder / "found").read_text()
    assert answering.wait(10), "the thread goes on without anybody who could ask"
    answering.close()
    found = json.loads((folder / "found").read_text())
    assert isinstance(found, list)
    return found


def spans(regions: Any) -> Spans:
    return normalise((start, end) for start, end, _ in regions)


async def test_only_hidden_pages_are_missing(target: Target, tmp_path: Path) -> None:
    begin, end = row(target, 1)
    hidden = HiddenPages(target.pid)
    everything = [(each.start, each.end) for each in read_mappings(target.pid) if each.end < 1 << 63]
    wanted = [(target.pid, *each, 4096) for each in (*everything, (begin, end))]
    found = await under_filter(target, hidden, tmp_path, *wanted)
    for (_, first, last, _), seen in zip(wanted, found, strict=True):
        really = scanner.scan(target.pid, first, last, 4096)
        assert spans(seen) == difference(spans(really), hidden.hidden[target.pid])
    private = (begin, begin + 64 * PAGE_BYTES), (end - 64 * PAGE_BYTES, end)
    assert intersection(hidden.hidden[target.pid], [(begin, end)]) == list(private)
    assert count_pages(spans(found[-1])) == 32
    assert not hidden.refusal


@pytest.mark.parametrize("room", [1, 3, 4096])
async def test_a_full_vector_is_gone_on_from(target: Target, tmp_path: Path, room: int) -> None:
    """Two mappings that are to be seen, with one between that is not."""
    begin, end = row(target, 0, 2)
    whole = (target.pid, begin, end)
    (seen,) = await under_filter(target, HiddenPages(target.pid), tmp_path, (*whole, room))
    middle = [(begin + 64 * PAGE_BYTES, begin + 128 * PAGE_BYTES)]
    assert spans(seen) == difference(spans(scanner.scan(*whole, 4096)), middle)
    assert len(seen) == 64


async def test_what_is_nothing_of_the_workload_s_is_left_alone(target: Target, tmp_path: Path) -> None:
    """A process of no interest; a scan that does not ask for content."""
    begin, end = row(target)
    hidden = HiddenPages(target.pid)
    heap = next(each for each in read_mappings(os.getpid()) if each.name == "[heap]")
    ours = (os.getpid(), heap.start, heap.start + PAGE_BYTES, 8)
    written = (target.pid, begin, end, 4096, PRESENT | WRITTEN)
    mine, other = await under_filter(target, hidden, tmp_path, ours, written)
    assert spans(mine) == [(heap.start, heap.start + PAGE_BYTES)]
    assert spans(other) == spans(scanner.scan(*written))
    assert not hidden.hidden


async def test_children_are_tasks_of_the_workload_too(target: Target, tmp_path: Path) -> None:
    begin, _ = row(target)
    child = target.fork()
    hidden = HiddenPages(target.pid)
    assert await under_filter(target, hidden, tmp_path, (child, begin, begin + 64 * PAGE_BYTES, 64)) == [[]]
    assert list(hidden.hidden) == [child]


async def test_many_answers_under_signals(target: Target, tmp_path: Path) -> None:
    begin, end = row(target)
    found = await under_filter(target, HiddenPages(target.pid), tmp_path, (target.pid, begin, end, 64), repeats=500)
    assert len(found) == 500
    assert all(each == found[0] for each in found)


async def test_nobody_answers_and_the_scan_fails(target: Target, tmp_path: Path) -> None:
    """As when the agent dies: the listener is gone with it."""
    begin, end = row(target)
    running = await start(scanning(tmp_path, target, (target.pid, begin, end, 64)), tmp_path / "found")
    agent = start_agent_that_dies(target.pid, tmp_path, running.pid)
    assert agent.stdout is not None
    assert agent.stdout.readline() == "armed\n"
    await let_go(tmp_path)
    assert agent.wait(10) == 7
    agent.stdout.close()
    assert await running.wait() == 0
    assert json.loads((tmp_path / "found").read_text()) == [errno.ENOSYS]


def start_agent_that_dies(root: int, folder: Path, command: int) -> subprocess.Popen[str]:
    """It has put the scanner under the filter, and then it is gone."""
    program = f"""
import os, time
from pathlib import Path
from coordinator.agent import criu_filter
from coordinator.agent.memory.hidden_pages import HiddenPages
criu_filter._answer_all = lambda *_: os._exit(7)
criu_filter.CriuFilter({root}, HiddenPages({root}), Path({str(folder)!r})).arm({command})
print("armed", flush=True)
time.sleep(60)
"""
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


async def test_a_kernel_that_refuses_is_told_and_everything_is_seen(target: Target, tmp_path: Path) -> None:
    """A process can have one listener (EBUSY)."""
    begin, end = row(target)
    whole = (target.pid, begin, end, 4096)
    hidden = HiddenPages(target.pid)
    running = await start(scanning(tmp_path, target, whole), tmp_path / "found")
    until(lambda: "scanner" in Path(f"/proc/{running.pid}/cmdline").read_text())
    other = put_under_filter(running.pid, filter_program(os.uname().machine))
    answering = CriuFilter(target.pid, hidden, tmp_path)
    answering.arm(running.pid)
    await let_go(tmp_path)
    assert await asyncio.to_thread(answering.wait, 10)
    os.close(other)
    assert await running.wait() == 0
    answering.close()
    assert os.strerror(errno.EBUSY) in hidden.refusal


async def test_who_never_comes_to_its_pages_is_not_waited_for(target: Target, tmp_path: Path) -> None:
    answering = CriuFilter(target.pid, HiddenPages(target.pid), tmp_path)
    answering.arm(target.pid)
    assert not answering.wait(0.01)
    answering.close()
    answering.close()
    assert answering.wait(10)


async def test_others_that_open_the_image_are_let_in(target: Target, tmp_path: Path) -> None:
    hidden = HiddenPages(target.pid)
    answering = CriuFilter(target.pid, hidden, tmp_path)
    answering.arm(target.pid)
    assert (tmp_path / image(target)).read_bytes() == b""
    answering.close()
    assert answering.wait(10)
    assert status_field(os.getpid(), "Seccomp") == "0"


@pytest.mark.parametrize("hide", [True, False])
async def test_whoever_has_to_know_is_called_while_the_scanner_waits(
    target: Target, tmp_path: Path, hide: bool
) -> None:
    begin, end = row(target)
    hidden = HiddenPages(target.pid) if hide else None
    running = await start(scanning(tmp_path, target, (target.pid, begin, end, 4096)), tmp_path / "found")
    found: list[str] = []
    answering = CriuFilter(target.pid, hidden, tmp_path, lambda: found.append((tmp_path / "found").read_text()))
    answering.arm(running.pid)
    await let_go(tmp_path)
    assert await running.wait() == 0
    assert await asyncio.to_thread(answering.wait, 10)
    answering.close()
    assert found == [""]
    (seen,) = json.loads((tmp_path / "found").read_text())
    assert spans(seen) == ([] if hide else spans(scanner.scan(target.pid, begin, end, 4096)))


def test_nothing_hidden_nothing_done(target: Target, tmp_path: Path) -> None:
    answering = CriuFilter(target.pid, None, tmp_path)
    answering.arm(target.pid)
    answering.close()
    assert not list(tmp_path.iterdir())


def test_what_is_put_under_the_filter_is_otherwise_as_it_was(target: Target) -> None:
    def looks() -> tuple[list[str], list[str], list[str]]:
        maps = Path(f"/proc/{target.pid}/maps").read_text().splitlines()
        status = [status_field(target.pid, name) for name in ("NoNewPrivs", "SigBlk", "SigIgn", "CapEff", "TracerPid")]
        return names(f"/proc/{target.pid}/fd"), maps, status

    before = looks()
    listener = put_under_filter(target.pid, filter_program(os.uname().machine))
    assert looks() == before
    assert status_field(target.pid, "Seccomp") == "2"
    os.close(listener)
    assert target.run("sum(range(1000))") == 499500


ASKING = """
import ctypes, os, select, struct, sys
from pathlib import Path
from coordinator.agent.epolls import is_entry
image, root, epoll, *numbers = sys.argv[1:]
Path(image).with_name("go").read_bytes()
Path(image).write_bytes(b"")
print(*(is_entry(int(root), int(epoll), int(number)) for number in numbers))
"""

#: An epoll with so many sockets that it pays to look at them before CRIU asks.
WATCHING = """
import select, socket
pairs = [socket.socketpair() for _ in range(1000)]
epoll = select.epoll()
for pair in pairs:
    for end in pair:
        epoll.register(end, select.EPOLLIN)
"""


async def said_of_entries(
    target: Target, folder: Path, hidden: HiddenPages | None, *numbers: int, still: Callable[[], object] | None = None
) -> list[str]:
    """What a program like CRIU is told, whether entries of the target's epoll are what these numbers say. ``still``
    is called after it was looked at them already."""
    os.mkfifo(folder / "go")
    image = folder / f"ids-{target.pid}.img"
    words = (str(image), str(target.pid), str(target.run("epoll.fileno()")), *map(str, numbers))
    running = await start(Command((sys.executable, "-c", ASKING, *words), {"PYTHONPATH": str(ROOT)}), folder / "said")
    over = CriuFilter(target.pid, hidden, folder)
    over.look()
    if still is not None:
        assert over.at_stillness is not None
        over.at_stillness()
        still()
    over.arm(running.pid)
    await let_go(folder)
    assert await running.wait() == 0, (folder / "said").read_text()
    over.close()
    assert await asyncio.to_thread(over.wait, 10)
    return (folder / "said").read_text().split()


@pytest.mark.parametrize("hides", [False, True])
async def test_who_asks_of_epolls_that_were_looked_at_is_told_yes(target: Target, tmp_path: Path, hides: bool) -> None:
    """Of a number that is nobody's too, which shows that it is not the kernel who looks."""
    target.run(f"exec({WATCHING!r}, globals())")
    hidden = HiddenPages(target.pid) if hides else None
    wanted = (target.run("pairs[0][0].fileno()"), 99999)
    assert await said_of_entries(target, tmp_path, hidden, *wanted) == ["True", "True"]
    assert hidden is None or not hidden.refusal


async def test_what_was_seen_before_the_scanner_came_is_not_looked_at_again(target: Target, tmp_path: Path) -> None:
    target.run(f"exec({WATCHING!r}, globals())")
    close = "exec('import os; copy = os.dup(pairs[7][0].fileno()); pairs[7][0].close()', globals())"
    assert await said_of_entries(target, tmp_path, None, 99999, still=lambda: target.run(close)) == ["True"]


async def test_with_one_entry_that_is_not_what_its_number_says_the_kernel_answers(
    target: Target, tmp_path: Path
) -> None:
    target.run(f"exec({WATCHING!r}, globals())")
    target.run("exec('import os; copy = os.dup(pairs[7][0].fileno()); pairs[7][0].close()', globals())")
    wanted = (target.run("pairs[0][0].fileno()"), 99999)
    assert await said_of_entries(target, tmp_path, None, *wanted) == ["True", "False"]


async def test_of_few_entries_the_kernel_is_asked(target: Target, tmp_path: Path) -> None:
    target.run(f"exec({WATCHING.replace('1000', '10')!r}, globals())")
    assert await said_of_entries(target, tmp_path, None, 99999) == ["False"]
    over = CriuFilter(target.pid, None, tmp_path)
    over.look()
    assert over.at_stillness is None
    assert status_field(os.getpid(), "Seccomp") == "0"
