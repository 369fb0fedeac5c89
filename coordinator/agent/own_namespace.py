"""Finds the network namespace that a workload has for itself, and says whether it can be moved. Read-only."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from coordinator.agent.tasks import PROC
from coordinator.facts import NamespaceFacts, Obstacle, RouteFacts, WorkloadSpec
from netfix import namespace
from netfix.attachment import Attachment, describe
from netfix.errors import NetfixError

_PODMAN_HINT = "Create the container on both hosts with --network host, or ns:PATH and a namespace that you make."
_HINT = 'Give it a path in config.json, as in {"type": "network", "path": "/run/netns/NAME"}, on both hosts.'


@dataclasses.dataclass(frozen=True, slots=True)
class OwnNamespace:
    """``facts``: of a namespace that can be moved; ``obstacle``: why it cannot. Both ``None``: it is the host's."""

    facts: NamespaceFacts | None = None
    obstacle: Obstacle | None = None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Look at the workload's sockets from where they are."""
        if self.facts is None:
            yield
            return
        with namespace.entered(Path(self.facts.path)):
            yield


def own_namespace(workload: WorkloadSpec, configured: Path | None, root_pid: int) -> OwnNamespace:
    """The network namespace of a running workload; ``configured``: the path of one that its definition names."""
    its = PROC / str(root_pid) / "ns/net"
    if namespace.same(its, PROC / str(os.getpid()) / "ns/net"):
        return OwnNamespace()
    if configured is None or not namespace.same(configured, its):
        by_podman = workload.runtime == "podman"
        where, hint = ("podman's --network", _PODMAN_HINT) if by_podman else ("config.json", _HINT)
        what = f"{configured} in {where} is another one" if configured else f"{where} names no path for it"
        return _refused(f"the workload has a network namespace of its own, and {what}", hint)
    try:
        return OwnNamespace(facts_of(configured, describe(configured)))
    except NetfixError as error:
        return _refused(error.message, error.hint)


def facts_of(path: Path, attachment: Attachment) -> NamespaceFacts:
    """The attachment as facts for a message."""
    values = {field.name: getattr(attachment, field.name) for field in dataclasses.fields(attachment)}
    values["routes"] = tuple(RouteFacts(**dataclasses.asdict(route)) for route in attachment.routes)
    return NamespaceFacts(path=str(path), **values)


def _refused(message: str, hint: str) -> OwnNamespace:
    return OwnNamespace(obstacle=Obstacle(code="OWN_NETWORK_NAMESPACE", message=message, hint=hint))
