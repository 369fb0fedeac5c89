"""A program under the filter sees of page maps what it is to see, and the kernel answers the rest."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.agent.memory.base import PAGE_BYTES
from coordinator.agent.memory.hidden_pages import HiddenPages
from coordinator.agent.memory.mappings import read_mappings
from coordinator.agent.memory.pagemap import PRESENT, WRITTEN
from coordinator.agent.memory.runs import Spans, count_pages, difference, intersection, normalise
from coordinator.agent.memory.scan_filter import ScanFilter
from coordinator.agent.process import Command, start
from tests.contract import scanner
from tests.contract.memory_target import Target, until

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


@pytest.fixture
def target() -> Iterator[Target]:
    with Target() as started:
        yield started


def row(target: Target, *of_file: int) -> tuple[int, int]:
    """Address of the first and after the last of three areas (see ``ROW``)."""
    target.run(f"exec({ROW.replace('OF_FILE', repr(of_file))!r}, globals())")
    begin = target.run("base")
    return begin, begin + 3 * 64 * PAGE_BYTES


def python(*argv: str) -> Command:
    return Command((sys.executable, *argv), {"PYTHONPATH": str(ROOT)})


async def under_filter(hidden: HiddenPages, tmp_path: Path, *scans: Scan, repeats: int = 1) -> list[Any]:
    """What a scanner under the filter finds."""
    command = python(scanner.__file__, str(repeats), *(" ".join(map(str, each)) for each in scans))
    found = json.loads(await run(ScanFilter(hidden), command, tmp_path / "found"))
    assert isinstance(found, list)
    return found


async def run(scans: ScanFilter, command: Command, output: Path) -> str:
    running = await scans.start(command, output)
    assert await running.wait() == 0, output.read_text()
    assert scans.wait(10), "the thread goes on without anybody who could ask"
    return output.read_text()


def spans(regions: Any) -> Spans:
    return normalise((start, end) for start, end, _ in regions)


async def test_only_hidden_pages_are_missing(target: Target, tmp_path: Path) -> None:
    begin, end = row(target, 1)
    hidden = HiddenPages(target.pid)
    everything = [(each.start, each.end) for each in read_mappings(target.pid) if each.end < 1 << 63]
    wanted = [(target.pid, *each, 4096) for each in (*everything, (begin, end))]
    found = await under_filter(hidden, tmp_path, *wanted)
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
    (seen,) = await under_filter(HiddenPages(target.pid), tmp_path, (*whole, room))
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
    mine, other = await under_filter(hidden, tmp_path, ours, written)
    assert spans(mine) == [(heap.start, heap.start + PAGE_BYTES)]
    assert spans(other) == spans(scanner.scan(*written))
    assert not hidden.hidden


async def test_children_are_tasks_of_the_workload_too(target: Target, tmp_path: Path) -> None:
    begin, _ = row(target)
    child = target.fork()
    hidden = HiddenPages(target.pid)
    assert await under_filter(hidden, tmp_path, (child, begin, begin + 64 * PAGE_BYTES, 64)) == [[]]
    assert list(hidden.hidden) == [child]


async def test_many_answers_under_signals(target: Target, tmp_path: Path) -> None:
    begin, end = row(target)
    found = await under_filter(HiddenPages(target.pid), tmp_path, (target.pid, begin, end, 64), repeats=500)
    assert len(found) == 500
    assert all(each == found[0] for each in found)


async def test_nobody_answers_and_the_scan_fails(target: Target, tmp_path: Path) -> None:
    """As when the agent dies: the listener is gone with it."""
    begin, end = row(target)
    found = tmp_path / "found"
    dying = """
import asyncio, os, sys
from pathlib import Path
from coordinator.agent.memory import scan_filter
from coordinator.agent.memory.hidden_pages import HiddenPages
from coordinator.agent.process import Command
scan_filter._answer_all = lambda *_: os._exit(0)
async def main():
    await scan_filter.ScanFilter(HiddenPages(1)).start(Command(tuple(sys.argv[2:]), {}), Path(sys.argv[1]))
    await asyncio.sleep(60)
asyncio.run(main())
"""
    scan = python(scanner.__file__, "1", f"{target.pid} {begin} {end} 64")
    agent = await start(python("-c", dying, str(found), *scan.argv), tmp_path / "agent")
    assert await agent.wait() == 0, (tmp_path / "agent").read_text()
    until(lambda: found.read_text().endswith("\n"))
    assert json.loads(found.read_text()) == [errno.ENOSYS]


async def test_a_kernel_that_refuses_is_told_and_the_command_runs(target: Target, tmp_path: Path) -> None:
    """A process can have one listener (EBUSY)."""
    begin, end = row(target)
    found = tmp_path / "found"
    nested = """
import asyncio, sys
from pathlib import Path
from coordinator.agent.memory.hidden_pages import HiddenPages
from coordinator.agent.memory.scan_filter import ScanFilter
from coordinator.agent.process import Command
async def main():
    hidden = HiddenPages(int(sys.argv[1]))
    scans = ScanFilter(hidden)
    status = await (await scans.start(Command(tuple(sys.argv[3:]), {}), Path(sys.argv[2]))).wait()
    print(status, scans.wait(10), hidden.refusal)
asyncio.run(main())
"""
    scan = python(scanner.__file__, "1", f"{target.pid} {begin} {end} 4096")
    inner = python("-c", nested, str(target.pid), str(found), *scan.argv)
    outer = ScanFilter(HiddenPages(target.fork()))
    assert await run(outer, inner, tmp_path / "said") == f"0 True {os.strerror(errno.EBUSY)}\n"
    assert spans(json.loads(found.read_text())[0]) == spans(scanner.scan(target.pid, begin, end, 4096))


async def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    scans = ScanFilter(HiddenPages(os.getpid()))
    output = tmp_path / "output"
    running = await scans.start(Command(("/nonexistent/criu",), {}), output)
    assert await running.wait() == 127
    assert scans.wait(10)
    assert "/nonexistent/criu: No such file or directory" in output.read_text()


async def test_what_runs_under_the_filter_is_otherwise_as_it_would_be(tmp_path: Path) -> None:
    """No privilege is given up, no signal ignored, no descriptor left open."""
    status = "grep -E '^(NoNewPrivs|SigIgn|CapEff)' /proc/self/status; ls /proc/self/fd | wc -l"
    command = Command(("sh", "-c", status), {})
    plain = tmp_path / "plain"
    await (await start(command, plain)).wait()
    assert await run(ScanFilter(HiddenPages(os.getpid())), command, tmp_path / "filtered") == plain.read_text()
