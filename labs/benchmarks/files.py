"""`labs/bench files`: does a freeze get longer with the number of files that a service has?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from labs import config, workloads
from labs.benchmarks.freeze import freeze_parts
from labs.benchmarks.measure import Row, median
from labs.benchmarks.session import HOSTS, Service, Settings, fresh_lab, move, other
from labs.commands import LabError
from labs.workloads import Workload

BOOKS = config.Workload("books", "runc", ("192.0.2.239/24",), container="books", bundle="/srv/books", files="sync")
PART = "files"
FILL = """\
import os, sys
for n in range(int(sys.argv[2])):
    folder = f"{sys.argv[1]}/many/{n // 500}"
    os.makedirs(folder, exist_ok=True)
    open(f"{folder}/{n}", "w").write(str(n))
"""


@dataclass(frozen=True)
class FilesBench:
    """How many files to try, and how many moves to make with each. The first move copies all; it is not counted."""

    settings: Settings
    counts: Sequence[int]
    runs: int

    def run(self, cases: list[Row], problems: list[str]) -> None:
        """Fill in one case for each count, as they come."""
        for count in self.counts:
            with self.settings.steps.step(f"{count} files"):
                try:
                    cases.append(self._case(count))
                except LabError as error:
                    problems.append(f"{count} files: {error}")

    def _case(self, count: int) -> Row:
        with fresh_lab(self.settings) as lab:
            lab.add_workload(BOOKS)
            workload = replace(Workload.of_lab(lab, BOOKS.name), program="bookkeeper")
            workloads.install(lab, workload)
            workloads.mount_data(lab.host(HOSTS[1]), workload)
            workloads.start(lab, workload, HOSTS[0])
            service = Service(lab, workload)
            lab.host(HOSTS[0]).run(["python3", "-c", FILL, workload.data, str(count)], timeout=300)
            moves = [self._move(service) for _ in range(1 + self.runs)]
        first, *counted = moves
        return {
            "files": count,
            "runs": len(counted),
            "first_total_ms": first["total_ms"],
            **{name: median(each[name] for each in counted) for name in ("freeze_ms", "files_ms", "total_ms")},
            "freeze_ms_all": [each["freeze_ms"] for each in counted],
            "files_ms_all": [each["files_ms"] for each in counted],
        }

    def _move(self, service: Service) -> Row:
        result = move(service, other(service.where()))
        if warnings := [each for each in result["warnings"] if "last pass" in each]:
            raise LabError("; ".join(warnings))
        parts = freeze_parts(service.lab, result)["source"]
        return {"freeze_ms": result["freeze_ms"], "files_ms": parts[PART], "total_ms": result["total_ms"]}
