"""Pure: can a workload's own network namespace be made on the destination? Part of ``preflight``."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_interface

from coordinator.facts import HostFacts, NamespaceFacts, WorkloadFacts, WorkloadSpec
from coordinator.findings import Finding, finding


def namespace_findings(
    *,
    workload: WorkloadSpec,
    namespace: NamespaceFacts,
    destination: str,
    parent: str,
    about: HostFacts | None,
    there: WorkloadFacts,
) -> Iterator[Finding]:
    """``parent``: what it would be attached to on the destination, of which ``about`` and ``there`` are the facts."""
    if there.namespace_taken:
        hint = f"Remove it if nothing uses it: ip netns delete {there.namespace_taken.rpartition('/')[2]}."
        yield finding("NAMESPACE_TAKEN", destination, f"{there.namespace_taken} is there already", hint)
    if about is not None and parent not in about.interfaces:
        message = f"{namespace.interface} of {workload.name} is attached to {parent}, which is not there"
        yield finding("NAMESPACE_PARENT_MISSING", destination, message)
    services = {ip_interface(text) for text in workload.addresses}
    for text in namespace.addresses:
        if ip_interface(text) not in services:
            message = f"{text} is in the network namespace {namespace.path}, and not among the addresses"
            yield finding("NAMESPACE_OTHER_ADDRESS", workload.name, message)
