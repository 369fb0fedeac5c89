"""Pure: is the workload on the destination what its runtime can restore? Part of ``preflight``."""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.facts import WorkloadFacts, WorkloadSpec
from coordinator.findings import Finding, finding


def runtime_findings(
    workload: WorkloadSpec, destination: str, here: WorkloadFacts, there: WorkloadFacts
) -> Iterator[Finding]:
    """``here`` is the workload on the source, ``there`` on the destination."""
    if there.state == "stopped":
        message = f"{destination} has a container {workload.container} already, which is not running"
        hint = f"Remove it there: {workload.runtime} delete {workload.container}."
        yield finding("ALREADY_PRESENT", destination, message, hint)
    if not there.bundle_present:
        what = there.bundle_problem or f"{workload.bundle or here.executable} is missing"
        yield finding("BUNDLE_MISSING", destination, what)
    elif there.bundle_problem:
        yield finding("BUNDLE_DIFFERS", destination, there.bundle_problem)
    elif there.bundle_digest != here.bundle_digest:
        what = f"{workload.bundle}/config.json" if workload.bundle else f"podman's container {workload.container}"
        yield finding("BUNDLE_DIFFERS", destination, f"{what} is not the source's")
