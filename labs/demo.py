"""labs/demo: a service in a runc container moves between two hosts under load, and its clients say what they saw.

Everything is real: hosts with their own kernel namespaces and SSH servers, `livemove` run as an operator runs it,
clients that check every byte. Exit status: 0 all well, 1 a move failed or a client noticed more than a pause, 2 usage,
130 interrupted.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from labs import entry, workloads
from labs.clients.control import Clients
from labs.commands import LabError
from labs.lab import Lab, find
from labs.lab_session import lab_for_a_while, only_one
from labs.livemove import migrate
from labs.state import Paths
from labs.steps import Steps

SERVICE = "counter"
ROUTE = ("alpha", "beta")
WARM_UP_S = 0.5
SETTLE_S = 1.0
"""How long the clients watch on after a move: what goes wrong late, a retransmission or a reset, counts too."""

CLIENT_FIELDS = ("connections", "lost", "resets", "wrong_bytes", "longest_gap_ms", "retransmissions")
TIMES = ("freeze\nms", "total\nms", "longest\ngap ms")
HARM_FIELDS = ("lost", "resets", "wrong_bytes")


@dataclass
class Outcome:
    """What the demo has to tell, so far as it came."""

    hops: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Demo:
    """The demo's settings, and where it speaks."""

    lab: str
    connections: int
    hops: int
    keep: bool
    steps: Steps

    def run(self, outcome: Outcome) -> None:
        """The whole story. What is set up is taken down again, whatever happens."""
        with ExitStack() as undo:
            undo.enter_context(only_one(self.lab))
            lab = undo.enter_context(lab_for_a_while(self.lab, self.steps, keep=self.keep))
            workload = workloads.Workload.of_lab(lab, SERVICE)
            with self.steps.step(f"Service {SERVICE!r} in a runc container on {ROUTE[0]}"):
                workloads.stop(lab, workload)  # left there by a demo that was kept
                workloads.install(lab, workload)
                workloads.start(lab, workload, ROUTE[0])
            with self.steps.step(f"{self.connections} client connections"):
                address = workload.listens_on[0]
                clients = undo.enter_context(Clients(lab, address, workloads.PORT, self.connections))
                time.sleep(WARM_UP_S)
            for hop in range(self.hops):
                self._hop(lab, workload, clients, ROUTE[(hop + 1) % 2], outcome)
                if outcome.problems:
                    return
            outcome.problems += harm(clients.stop(), "the clients' last word")

    def _hop(
        self, lab: Lab, workload: workloads.Workload, clients: Clients, destination: str, outcome: Outcome
    ) -> None:
        with self.steps.step(f"Move {len(outcome.hops) + 1} of {self.hops}: to {destination}, under load"):
            clients.begin_hop()
            moved = migrate(lab, workload.name, destination, self.steps.note)
            time.sleep(SETTLE_S)
            seen = clients.end_hop()
            outcome.hops.append({**moved, "clients": {name: seen[name] for name in CLIENT_FIELDS}})
            what = f"move to {destination}"
            if moved.get("outcome") != "moved" or moved.get("exit_code") != 0:
                outcome.problems.append(f"{what}: {moved.get('outcome')}: {moved.get('error')}")
            elif (found := workloads.where(lab, workload)) != [destination]:
                outcome.problems.append(f"{what}: the service listens on {' and '.join(found) or 'no host'}")
            outcome.problems += harm(seen, what)


def harm(seen: dict[str, Any], when: str) -> list[str]:
    """Everything in a report of the clients that must not happen, as sentences."""
    counts = [f"{name} {seen[name]}" for name in HARM_FIELDS if seen[name]]
    return [f"{when}: {', '.join(counts)}", *seen["troubles"]] if counts else []


def table(hops: list[dict[str, Any]]) -> Table:
    """What the clients saw, one row a move."""
    rows = Table(title="What the clients saw", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in ("move", "outcome"):
        rows.add_column(heading, no_wrap=True)
    for heading in (*TIMES, "connec-\ntions", "lost", "reset", "wrong\nbytes", "re-\nsent"):
        rows.add_column(heading, justify="right", no_wrap=True)
    for hop in hops:
        seen = hop["clients"]
        times = (hop.get("freeze_ms"), hop.get("total_ms"), seen["longest_gap_ms"])
        rows.add_row(
            f"{hop.get('source')} → {hop.get('destination')}",
            str(hop.get("outcome")),
            *("–" if value is None else f"{value:.0f}" for value in times),
            *(str(seen[name]) for name in ("connections", *HARM_FIELDS, "retransmissions")),
        )
    return rows


def how_to_go_on(lab: str) -> str:
    return (
        f"The lab {lab!r} is up, with the service in it (the clients have left).\n"
        f"  labs/lab --name {lab} shell     the operator's shell, for instance for:\n"
        f"                                livemove migrate {SERVICE} --to beta\n"
        f"  labs/lab --name {lab} status    machines and addresses\n"
        f"  labs/lab --name {lab} down      take it down"
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--name", default="demo", show_default=True, help="Name of the demo's lab.")
@click.option("--connections", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--hops", type=click.IntRange(1, 100), default=2, show_default=True, help="Moves, there and back.")
@click.option("--keep", is_flag=True, help="Leave the lab up and say how to go on.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def cli(name: str, connections: int, hops: int, keep: bool, as_json: bool) -> None:
    """Move a running service alpha → beta → alpha under load, and show what its clients saw."""
    console = Console(stderr=True)
    outcome = Outcome()
    try:
        Paths(name)  # says at once if that cannot be the name of a lab
        Demo(name, connections, hops, keep, Steps(console)).run(outcome)
    except LabError as error:
        outcome.problems.append(str(error))
    if as_json:
        problems = {"problems": outcome.problems} if outcome.problems else {}
        click.echo(json.dumps({"hops": outcome.hops, **problems}))
    elif outcome.hops:
        Console().print(table(outcome.hops))
    for problem in outcome.problems:
        console.print(f"Error: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
    if keep and find(Paths(name)):
        console.print(how_to_go_on(name), markup=False, highlight=False)
    sys.exit(1 if outcome.problems else 0)


if __name__ == "__main__":
    entry.run(cli, "labs/demo")
