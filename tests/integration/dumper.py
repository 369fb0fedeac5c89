"""Dumps a workload of the host it runs on, as a move would, and lets it run on: says what was in the images.

A program for a host of the lab, with the agent's code in its path: `dumper.py WORKLOAD HIDE [TIMES]`, the workload as
JSON, HIDE `yes` or `no`. Prints a JSON list: for each dump the milliseconds for which it froze the tasks, and for each
process counts of pages: `present` and `lazy` ones in its image, those `hidden` from CRIU which hold something, those of
them that are in the image all the same (`told`), and those of its private memory that are neither hidden nor in the
image (`lost`). That is checked against the page maps of the tasks while they stand frozen. And whether the entries
of their epolls were looked at before CRIU came to files (`epolls_in_time`), and are what their numbers say
(`as_numbered`); and whether that look had begun when all tasks stood still, before CRIU was held (`before_held`).
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

from coordinator.agent import criu_filter
from coordinator.agent.assembly import runtime_of
from coordinator.agent.criu import HeldCriu
from coordinator.agent.epolls import Epolls
from coordinator.agent.memory.base import PAGE_BYTES, Backing
from coordinator.agent.memory.copying import processes_of
from coordinator.agent.memory.hidden_pages import HiddenPages
from coordinator.agent.memory.mappings import read_mappings
from coordinator.agent.memory.pagemap import FILE, PFNZERO, PRESENT, SWAPPED, Pagemap, guard_category
from coordinator.agent.memory.runs import Spans, count_pages, difference, intersection, normalise
from coordinator.agent.priority import set_pace
from coordinator.facts import WorkloadSpec
from coordinator.journal import Journal
from netfix.gate import CLOSED, NftGate

#: images/pagemap.proto, criu/include/magic.h.
_MAGICS = struct.pack("=II", 0x54564319, 0x56084025)
_ADDRESS, _COMPAT_PAGES, _FLAGS, _PAGES = 1, 2, 4, 5
_LAZY, _PRESENT = 1 << 1, 1 << 2


def entries(image: Path) -> list[dict[int, int]]:
    """The entries of a page map, their fields by number: all of them varints."""
    data = image.read_bytes()
    assert data.startswith(_MAGICS)
    found, at = [], len(_MAGICS)
    while at < len(data):
        (length,) = struct.unpack_from("=I", data, at)
        found.append(_fields(data[at + 4 : at + 4 + length]))
        at += 4 + length
    return found[1:]  # the first is a head


def _fields(message: bytes) -> dict[int, int]:
    numbers, value, shift = [], 0, 0
    for byte in message:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(value)
            value = shift = 0
    return {tag >> 3: number for tag, number in zip(numbers[::2], numbers[1::2], strict=True)}


def with_flag(found: list[dict[int, int]], flag: int) -> Spans:
    """The pages whose entries have a flag; without the field they are present (criu/pagemap.c)."""
    return normalise(
        (each[_ADDRESS], each[_ADDRESS] + (each.get(_PAGES) or each[_COMPAT_PAGES]) * PAGE_BYTES)
        for each in found
        if each.get(_FLAGS, _PRESENT) & flag
    )


def droppable(pid: int) -> set[int]:
    """Where the mappings begin that may lose their pages at any time, which CRIU never dumps (mmap(2), MAP_DROPPABLE):
    the state of a C library's getrandom(3)."""
    found, start = set(), 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, flags = line.partition(":")
        if name == "VmFlags" and "dp" in flags.split():
            found.add(start)
        elif "-" in name.split()[0]:
            start = int(name.partition("-")[0], 16)
    return found


def private_pages(pid: int) -> Spans:
    """The pages that a process has for itself."""
    passing = droppable(pid)
    absent = PFNZERO | FILE | guard_category()
    with Pagemap(pid) as pagemap:
        return normalise(
            (start, end)
            for mapping in read_mappings(pid)
            if not mapping.shared and mapping.backing is not Backing.DEVICE and mapping.start not in passing
            for start, end, _ in pagemap.scan(mapping.start, mapping.end, absent=absent, any_of=PRESENT | SWAPPED)
        )


def counts(image: Path, pid: int, hidden: Spans) -> dict[str, int]:
    """See the module."""
    found = entries(image)
    listed = normalise((*with_flag(found, _LAZY), *with_flag(found, _PRESENT)))
    held = private_pages(pid)
    return {
        "present": count_pages(with_flag(found, _PRESENT)),
        "lazy": count_pages(with_flag(found, _LAZY)),
        "hidden": count_pages(intersection(held, hidden)),
        "told": count_pages(intersection(listed, hidden)),
        "lost": count_pages(difference(difference(held, hidden), listed)),
    }


class WatchedEpolls(Epolls):
    """Worth while for any number of entries."""

    images = Path()
    in_time = as_they_say = before_held = False

    def pays(self) -> bool:
        """See ``Epolls``."""
        return True

    def look(self) -> None:
        """See ``Epolls``."""
        if self._answer is None and threading.current_thread().name == "freeze-watch":
            WatchedEpolls.before_held = True
        super().look()

    def as_numbered(self) -> bool:
        """See ``Epolls``."""
        WatchedEpolls.in_time = not list(self.images.glob("fdinfo-*"))
        WatchedEpolls.as_they_say = super().as_numbered()
        return WatchedEpolls.as_they_say


async def dump(workload: WorkloadSpec, folder: Path, *, hide: bool) -> dict[str, Any]:
    """One dump that is given up when it is complete."""
    runtime = runtime_of(workload)
    tasks = await runtime.find()
    images, work = folder / "images", folder / "work"
    images.mkdir()
    work.mkdir()
    WatchedEpolls.images = images
    WatchedEpolls.in_time = WatchedEpolls.as_they_say = WatchedEpolls.before_held = False
    journal = Journal.create(folder, "m-1", "source", {})
    hidden = HiddenPages(tasks.root_pid) if hide else None
    command = runtime.dump_command(tasks, images, work, lazy=True)
    gate = NftGate("dumper", [address.partition("/")[0] for address in workload.addresses])
    criu = HeldCriu(work, images)
    pid = tasks.root_pid
    running = await criu.dump(command, journal.path, lambda _: None, root_pid=pid, lazy=True, hidden=hidden)
    try:
        await running.ready()
        await gate.set(CLOSED)  # or CRIU meets queues that grow while it reads them
        began = time.monotonic()
        running.freeze()
        await running.dumped()
        frozen_ms = (time.monotonic() - began) * 1000
        secret = hidden.hidden if hidden is not None else {}
        pids = processes_of(tasks.root_pid)
        alive = [(inner, pid) for inner, pid in pids.items() if read_mappings(pid)]  # a zombie has no memory
        processes = [counts(images / f"pagemap-{inner}.img", pid, secret.get(pid, [])) for inner, pid in alive]
    finally:
        await running.end()
        await gate.remove()
        gate.close()
        journal.close()
    return {
        "frozen_ms": round(frozen_ms, 1),
        "refusal": "" if hidden is None else hidden.refusal,
        "epolls_in_time": WatchedEpolls.in_time,
        "as_numbered": WatchedEpolls.as_they_say,
        "before_held": WatchedEpolls.before_held,
        "processes": processes,
    }


async def main(workload: str, hide: str, times: str = "1") -> None:
    """See the module."""
    set_pace("urgent")
    said = []
    with mock.patch.object(criu_filter, "Epolls", WatchedEpolls):
        for _ in range(int(times)):
            with tempfile.TemporaryDirectory(dir="/run", prefix="dumper-") as folder:
                said.append(await dump(WorkloadSpec(**json.loads(workload)), Path(folder), hide=hide == "yes"))
    print(json.dumps(said))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
