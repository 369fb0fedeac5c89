"""labs/soak: what has to hold for many moves in a row, there and back or round all hosts, on the same connections.

Exit status: 0 all well, 1 a move failed or something was damaged, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import click
from rich.console import Console

from labs import entry, workloads
from labs.clients.control import Clients
from labs.commands import LabError
from labs.demo import harm
from labs.lab import Lab
from labs.lab_session import lab_for_a_while, only_one
from labs.livemove import migrate
from labs.steps import Steps
from labs.topology import HOSTS
from labs.workloads import PORT, Workload

CHAIN = tuple(host.name for host in HOSTS)
THERE_AND_BACK = CHAIN[:2]
CONNECTIONS = 4
PROGRAM = "memory_server"
SERVICES = ("counter", "echo")
MODES = ("auto", "pre-copy", "post-copy", "hybrid", "stop-copy")


@dataclass
class Outcome:
    """What became of the moves of one service."""

    service: str
    hops: int = 0
    pages_checked: int = 0
    wrong_pages: int = 0
    lost_connections: int = 0
    wrong_bytes: int = 0
    modes: dict[str, int] = field(default_factory=dict)
    longest_gap_ms: float = 0.0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Soak:
    """The settings of one soak."""

    hops: int
    mode: str
    memory_mb: int
    dirty_mb_s: float
    route: tuple[str, ...]
    steps: Steps

    def run(self, lab: Lab, outcome: Outcome) -> None:
        """Move round the route, and look at every page after each move."""
        workload = memory_workload(lab, outcome.service, self.memory_mb, self.dirty_mb_s)
        workloads.stop(lab, workload)
        workloads.install(lab, workload)
        workloads.start(lab, workload, self.route[0])
        try:
            with Clients(lab, workload.listens_on[0], PORT, CONNECTIONS) as clients:
                for hop in range(self.hops):
                    to = self.route[(hop + 1) % len(self.route)]
                    with self.steps.step(f"{outcome.service}: move {hop + 1} of {self.hops}, to {to}"):
                        self._hop(lab, workload, clients, to, outcome)
                    if outcome.problems:
                        return
        finally:
            workloads.stop(lab, workload)

    def _hop(self, lab: Lab, workload: Workload, clients: Clients, to: str, outcome: Outcome) -> None:
        clients.begin_hop()
        moved = migrate(lab, workload.name, to, options=("--mode", self.mode))
        if moved.get("outcome") != "moved" or moved.get("exit_code") != 0:
            outcome.problems.append(f"move to {to}: {moved.get('outcome')}: {moved.get('error')}")
            return
        checked = clients.check_memory()
        seen = clients.end_hop()
        outcome.hops += 1
        outcome.modes[moved["mode"]] = outcome.modes.get(moved["mode"], 0) + 1
        outcome.pages_checked += checked["pages"]
        outcome.wrong_pages += checked["wrong_pages"]
        outcome.lost_connections += seen["lost"]
        outcome.wrong_bytes += seen["wrong_bytes"]
        outcome.longest_gap_ms = max(outcome.longest_gap_ms, seen["longest_gap_ms"])
        if checked["wrong_pages"]:
            notes = workloads.wrong_pages(lab, workload)
            outcome.problems.append(f"move {outcome.hops}, to {to}: {checked['wrong_pages']} wrong pages\n{notes}")
        outcome.problems += harm(seen, f"move {outcome.hops}, to {to}")


def memory_workload(lab: Lab, name: str, memory_mb: int, dirty_mb_s: float) -> Workload:
    """A workload of the lab's configuration with memory of every kind."""
    known = Workload.of_lab(lab, name, memory_mb=memory_mb, dirty_mb_s=dirty_mb_s)
    return replace(known, program=PROGRAM)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Move a service many times."""


@cli.command()
@click.option("--name", default="soak", show_default=True, help="Name of the lab.")
@click.option("--hops", type=click.IntRange(1, 10000), default=50, show_default=True, help="Moves of each service.")
@click.option("--service", "services", type=click.Choice(SERVICES), multiple=True, help="Which; else both runtimes.")
@click.option("--mode", type=click.Choice(MODES), default="auto", show_default=True)
@click.option("--memory-mb", type=click.IntRange(4, 4096), default=32, show_default=True)
@click.option(
    "--dirty-mb-s", type=float, default=4.0, show_default=True, help="Writes, in each process of the service."
)
@click.option("--chain", is_flag=True, help=f"Round all hosts ({', '.join(CHAIN)}), not there and back.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def memory(**options: Any) -> None:
    """Move a service with memory of every kind under writes, and look at every page after each move."""
    console = Console(stderr=True)
    steps = Steps(console)
    outcomes = [Outcome(service) for service in options["services"] or SERVICES]
    problems: list[str] = []
    try:
        with ExitStack() as undo:
            undo.enter_context(only_one(options["name"]))
            lab = undo.enter_context(lab_for_a_while(options["name"], steps))
            route = CHAIN if options["chain"] else THERE_AND_BACK
            soak = Soak(options["hops"], options["mode"], options["memory_mb"], options["dirty_mb_s"], route, steps)
            for outcome in outcomes:
                soak.run(lab, outcome)
    except LabError as error:
        problems.append(str(error))
    problems += [f"{outcome.service}: {problem}" for outcome in outcomes for problem in outcome.problems]
    if options["as_json"]:
        click.echo(json.dumps({"services": [asdict(outcome) for outcome in outcomes], "problems": problems}))
    else:
        for outcome in outcomes:
            click.echo(
                f"{outcome.service}: {outcome.hops} moves, {outcome.pages_checked} pages checked, "
                f"{outcome.wrong_pages} wrong, {outcome.lost_connections} connections lost"
            )
    for problem in problems:
        console.print(f"Error: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    entry.run(cli, "labs/soak")
