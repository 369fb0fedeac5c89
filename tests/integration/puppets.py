"""Two puppets with a service between them, and the same for a twin that is not moved: what is done to one is done to
the other, and what they say afterwards has to be the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from labs import config, workloads
from labs.clients.control import ClientProcess
from labs.lab import Lab
from labs.workloads import PORT, Workload

CONTROL = "control"
IPV4_PORT, IPV6_PORT, MAPPED_PORT = 7101, 7102, 7103

#: What is done up to a move, up to the next, and so on: it yields where the service is to be moved.
Story = Generator[None, None, None]


class ClientPuppet(ClientProcess):
    """The puppet in the clients machine."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab, "labs.programs.puppet", ["--stdio"])

    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """Have it do something; its answer."""
        return self._ask(json.dumps(command))


@dataclass
class Pair:
    """A client and a service. `seen` is what was noted, in order."""

    lab: Lab
    workload: Workload
    client_puppet: ClientPuppet
    seen: list[tuple[str, object]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return self.workload.listens_on[0]

    @property
    def address6(self) -> str:
        return self.workload.listens_on[1]

    def client(self, do: str, name: str, **arguments: Any) -> dict[str, Any]:
        """Have the client do something that succeeds."""
        return _succeeded(self.client_puppet.do({"do": do, "name": name, **arguments}), do, name)

    def service(self, do: str, name: str, **arguments: Any) -> dict[str, Any]:
        """Have the service do something that succeeds."""
        command = {"do": do, "name": name, **arguments}
        return _succeeded(self.client_puppet.do({"do": "tell", "name": CONTROL, "command": command}), do, name)

    def note(self, what: str, answer: object) -> None:
        """Note something that has to be the same for the twin."""
        self.seen.append((what, answer))

    def connect(self, name: str, port: int = IPV4_PORT, **options: Any) -> None:
        """A connection of that name, accepted."""
        address = self.address6 if port == IPV6_PORT else self.address
        self.client("connect", name, address=address, port=port, **options)
        self.client("connected", name)
        self.service("accept", name, listener=str(port))

    @contextmanager
    def client_offers_no(self, sysctl: str) -> Iterator[None]:
        """The clients machine begins its connections without an option of TCP."""
        machine = self.lab.machine("clients")
        machine.run(["sysctl", "-q", "-w", f"{sysctl}=0"])
        try:
            yield
        finally:
            machine.run(["sysctl", "-q", "-w", f"{sysctl}=1"])

    def to_service(self, name: str, size: int) -> None:
        """The service takes so many bytes, of which none may be wrong."""
        assert self.service("receive", name, size=size) == {"bytes": size, "wrong": 0, "ended": False}, name

    def to_client(self, name: str, size: int) -> None:
        """The client takes so many bytes, of which none may be wrong."""
        assert self.client("receive", name, size=size) == {"bytes": size, "wrong": 0, "ended": False}, name

    def exchange(self, name: str, size: int = 1000) -> None:
        """Bytes there and back."""
        self.client("send", name, size=size)
        self.to_service(name, size)
        self.service("send", name, size=size)
        self.to_client(name, size)


def _succeeded(answer: dict[str, Any], do: str, name: str) -> dict[str, Any]:
    assert "error" not in answer, f"{do} {name}: {answer['error']}"
    return answer


@contextmanager
def pair(lab: Lab, known: config.Workload, host: str) -> Iterator[Pair]:
    """A service on a host, with its client, and listeners for both families."""
    lab.add_workload(known)
    workload = replace(Workload.of_lab(lab, known.name), program="puppet")
    workloads.stop(lab, workload)
    workloads.install(lab, workload)
    workloads.start(lab, workload, host)
    try:
        with ClientPuppet(lab) as client:
            made = Pair(lab, workload, client)
            made.client("connect", CONTROL, address=made.address, port=PORT)
            made.client("connected", CONTROL)
            for port, address in ((IPV4_PORT, made.address), (IPV6_PORT, made.address6), (MAPPED_PORT, "::")):
                made.service("listen", str(port), address=address, port=port)
            yield made
    finally:
        workloads.stop(lab, workload)


def go_on(pairs: list[Pair], stories: dict[str, Callable[[Pair], Story]]) -> Iterator[None]:
    """Tell all stories to all pairs up to where they want to be moved; yields there."""
    told = [(name, each, story(each)) for each in pairs for name, story in stories.items()]
    while told:
        left = []
        for name, each, story in told:
            try:
                next(story)
                left.append((name, each, story))
            except StopIteration:
                continue
            except AssertionError as error:
                error.add_note(f"in the story {name!r} of {each.workload.name}")
                raise
        told = left
        if told:
            yield
