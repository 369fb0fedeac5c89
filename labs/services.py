"""labs/services: real services move there and back under load, and their clients check every answer.

Each service comes from Debian packages, runs in a container, and has clients of its own with open connections. Exit
status: 0 all well, 1 a move failed, or something was lost or wrong, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import click
from rich.console import Console
from rich.table import Table

from labs import entry, limits, workloads
from labs.catalogue import SERVICES
from labs.catalogue.base import Service
from labs.commands import LabError
from labs.housing import Runtime, ServiceClients, house, memory_mb, start
from labs.lab import Lab, find
from labs.lab_session import lab_for_a_while, only_one
from labs.livemove import migrate
from labs.state import Paths
from labs.steps import Steps

ROUTE = ("alpha", "beta")
WARM_UP_S = 1.0
SETTLE_S = 1.0
"""How long the clients watch on after a move: what goes wrong late, a retransmission or a reset, counts too."""


@dataclass
class Outcome:
    """What became of one service: the format of `--json`. Times are those of the worst hop."""

    name: str
    runtime: Runtime
    needed: str
    memory_mb: float = 0.0
    connections: int = 0
    hops: int = 0
    freeze_ms: float = 0.0
    longest_gap_ms: float = 0.0
    lost: int = 0
    wrong: int = 0
    refused: str = ""
    """The code with which livemove refuses to move it, as the catalogue says it does under this runtime."""

    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        sometimes = {name: values.pop(name) for name in ("refused", "problems")}
        return values | {name: value for name, value in sometimes.items() if value}


@dataclass(frozen=True)
class Tour:
    """Moves one service after the other; says how it goes."""

    lab: Lab
    hops: int
    keep: bool
    steps: Steps

    def take(self, service: Service, outcome: Outcome) -> None:
        """Start the service with its clients, move it `hops` times, and hear what the clients found at the end."""
        with ExitStack() as undo:
            with self.steps.step(f"{service.name}: starts on {ROUTE[0]}, and its clients"):
                workload = house(self.lab, service, outcome.runtime)
                if not self.keep:
                    undo.callback(workloads.stop, self.lab, workload)
                start(self.lab, service, workload, ROUTE[0])
                clients = undo.enter_context(ServiceClients(self.lab, service))
                time.sleep(WARM_UP_S)
            outcome.memory_mb = memory_mb(self.lab.host(ROUTE[0]), workload)
            for hop in range(self.hops):
                to = ROUTE[(hop + 1) % len(ROUTE)]
                with self.steps.step(f"{service.name}: move {hop + 1} of {self.hops}, to {to}, under load"):
                    self._hop(service, workload, clients, to, outcome)
                if outcome.problems:
                    return
                if outcome.refused:
                    break
            with self.steps.step(f"{service.name}: the clients look at everything once more"):
                seen = clients.stop()
            outcome.lost, outcome.wrong = seen["lost"], seen["wrong"]
            outcome.problems += [f"at the end: {trouble}" for trouble in seen["troubles"]]

    def _hop(
        self, service: Service, workload: workloads.Workload, clients: ServiceClients, to: str, outcome: Outcome
    ) -> None:
        clients.begin_hop()
        moved = migrate(self.lab, workload.name, to, self.steps.note)
        time.sleep(SETTLE_S)
        seen = clients.end_hop()
        outcome.connections = seen["connections"]
        outcome.lost += seen["lost"]
        outcome.wrong += seen["wrong"]
        outcome.longest_gap_ms = max(outcome.longest_gap_ms, seen["longest_gap_ms"])
        outcome.problems += [f"move to {to}: {trouble}" for trouble in seen["troubles"]]
        due = service.refused.get(outcome.runtime)
        if due and (moved.get("outcome"), (moved.get("error") or {}).get("code")) == ("refused", due):
            outcome.refused = due
        elif due:
            outcome.problems.append(f"move to {to}: {due} was due: {moved.get('outcome')}: {moved.get('error')}")
        elif moved.get("outcome") != "moved" or moved.get("exit_code") != 0:
            outcome.problems.append(f"move to {to}: {moved.get('outcome')}: {moved.get('error')}")
        elif (found := workloads.where(self.lab, workload)) != [to]:
            outcome.problems.append(f"move to {to}: it listens on {' and '.join(found) or 'no host'}")
        else:
            outcome.hops += 1
            outcome.freeze_ms = max(outcome.freeze_ms, moved["freeze_ms"])


def table(outcomes: list[Outcome]) -> Table:
    """One row a service."""
    rows = Table(title="Services moved under load", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in ("service", "runtime"):
        rows.add_column(heading, no_wrap=True)
    for heading in ("memory\nMB", "connec-\ntions", "hops", "freeze\nms", "longest\ngap ms", "lost", "wrong"):
        rows.add_column(heading, justify="right", no_wrap=True)
    rows.add_column("what it needed")
    for each in outcomes:
        numbers = (each.memory_mb, each.connections, each.hops, each.freeze_ms, each.longest_gap_ms)
        rows.add_row(
            each.name,
            each.runtime,
            *(f"{value:.0f}" for value in numbers),
            str(each.lost),
            str(each.wrong),
            f"not moved: {each.refused}" if each.refused else each.needed,
        )
    return rows


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", metavar="[NAME]...", type=click.Choice(tuple(SERVICES)), nargs=-1)
@click.option("--lab", "lab_name", default="services", show_default=True, help="Name of the lab.")
@click.option("--hops", type=click.IntRange(1, 100), default=4, show_default=True, help="Moves, there and back.")
@click.option(
    "--runtime", type=click.Choice(get_args(Runtime)), default="runc", show_default=True, help="What runs them."
)
@click.option("--keep", is_flag=True, help="Leave the lab up, with the services.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def cli(names: tuple[str, ...], **options: Any) -> None:
    """Move real services alpha → beta → alpha … under load, and have their clients check every answer."""
    console = Console(stderr=True)
    steps = Steps(console)
    lab_name, keep = options["lab_name"], options["keep"]
    outcomes: list[Outcome] = []
    problems: list[str] = []
    try:
        with ExitStack() as undo:
            undo.enter_context(only_one(lab_name))
            lab = undo.enter_context(lab_for_a_while(lab_name, steps, keep=keep, packages="services"))
            if note := limits.work_around(lab):
                steps.note(note)
            for name in names or SERVICES:
                outcomes.append(Outcome(name, options["runtime"], SERVICES[name].needed))
                Tour(lab, options["hops"], keep, steps).take(SERVICES[name], outcomes[-1])
    except LabError as error:
        problems.append(str(error))
    problems += [f"{outcome.name}: {problem}" for outcome in outcomes for problem in outcome.problems]
    if options["as_json"]:
        click.echo(json.dumps({"services": [each.to_json() for each in outcomes]}))
    elif outcomes:
        Console().print(table(outcomes))
    for problem in problems:
        console.print(f"Error: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
    if keep and find(Paths(lab_name)):
        console.print(f"The lab is up: labs/lab --name {lab_name} status, and then: down", highlight=False)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    entry.run(cli, "labs/services")
