"""Finds the network namespace that a workload has for itself, and says whether it can be moved. Read-only."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

from coordinator.agent.tasks import PROC
from coordinator.facts import NamespaceFacts, Obstacle, RouteFacts, WorkloadSpec
from netfix import namespace
from netfix.attachment import Attachment, describe
from netfix.errors import NetfixError

_PODMAN_HINT = "Create the container on both hosts with --network host."
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


def own_namespace(workload: WorkloadSpec, root_pid: int) -> OwnNamespace:
    """The network namespace of a running workload."""
    its = PROC / str(root_pid) / "ns/net"
    if namespace.same(its, PROC / str(os.getpid()) / "ns/net"):
        return OwnNamespace()
    if workload.runtime == "podman":
        return _refused("podman has given the container a network namespace of its own", _PODMAN_HINT)
    path = configured_path(workload)
    if path is None or not namespace.same(path, its):
        what = f"{path} in config.json is another one" if path else "config.json names no path for it"
        return _refused(f"the workload has a network namespace of its own, and {what}", _HINT)
    try:
        return OwnNamespace(facts_of(path, describe(path)))
    except NetfixError as error:
        return _refused(error.message, error.hint)


def configured_path(workload: WorkloadSpec) -> Path | None:
    """The path of a network namespace in the container's configuration (OCI runtime specification, config-linux)."""
    if workload.bundle is None:
        return None
    try:
        config = json.loads((Path(workload.bundle) / "config.json").read_bytes())
        named = [each.get("path") for each in config["linux"]["namespaces"] if each["type"] == "network"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the bundle's problem is told where its digest is made
    return Path(named[0]) if named and named[0] else None


def facts_of(path: Path, attachment: Attachment) -> NamespaceFacts:
    """The attachment as facts for a message."""
    values = {field.name: getattr(attachment, field.name) for field in dataclasses.fields(attachment)}
    values["routes"] = tuple(RouteFacts(**dataclasses.asdict(route)) for route in attachment.routes)
    return NamespaceFacts(path=str(path), **values)


def _refused(message: str, hint: str) -> OwnNamespace:
    return OwnNamespace(obstacle=Obstacle(code="OWN_NETWORK_NAMESPACE", message=message, hint=hint))
