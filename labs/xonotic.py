"""labs/xonotic: a game server with bots and players in it goes around the lab's hosts.

The players are scripted, speak the engine's own protocol, and never connect again. Exit status: 0 nobody was dropped
and no snapshot lost, 1 a move failed or a player lost something, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from labs import entry, limits, workloads
from labs.board import Board, table
from labs.catalogue.base import Service
from labs.catalogue.nexuiz import BOTS, NEXUIZ, PLACES, XONOTIC, XONOTIC_FILES, XONOTIC_SERVER
from labs.commands import LabError
from labs.game import Players, Result, Round
from labs.housing import house, memory_mb, start
from labs.lab import Lab, find
from labs.lab_session import lab_for_a_while, only_one
from labs.real_client import RealClient
from labs.state import Paths
from labs.steps import Steps
from labs.topology import HOSTS

MODES = ("auto", "stop-copy", "pre-copy", "post-copy", "hybrid")
WARM_UP_S = 10.0
"""The bots come one after the other and work out the ways through the level, which makes frames of a quarter second."""

PAUSE_S = 1.0
WATCHED_PAUSE_S = 15.0
"""Before each hop, with somebody to watch it."""


def chosen() -> tuple[Service, Path | None]:
    """The game, and where its files are if they are not those of a package."""
    if not (named := os.environ.get("XONOTIC_DIR")):
        return NEXUIZ, None
    directory = Path(named)
    if not (directory / XONOTIC_SERVER).is_file() or not (directory / "data").is_dir():
        raise LabError(
            f"XONOTIC_DIR: {directory} has no {XONOTIC_SERVER} or no data; name the unpacked game, or unset it"
        )
    return XONOTIC, directory


def how_to_join(lab: str, service: Service) -> str:
    """How a real client comes into the lab's network, for whoever has one on this machine."""
    return (
        f"The game is at {service.address}:{service.port}, in the lab's network. With a client here, as root:\n"
        f"  labs/lab --name {lab} exec clients -- {service.name} +connect {service.address}:{service.port}\n"
        f"That runs it in the network namespace {Paths(lab).netns('clients')}, and everything else of it here.\n"
        f"{WATCHED_PAUSE_S:.0f} s from hop to hop; Ctrl-C ends it."
    )


def photographer(
    lab: Lab, steps: Steps, undo: ExitStack, result: Result, directory: Path | None
) -> Callable[[str], None]:
    """What takes a picture of a real client's screen, as `NUMBER-HOST.png`; without a directory, nothing."""
    if directory is None:
        return lambda host: None
    if result.engine != NEXUIZ.name:
        raise LabError("pictures are those of Nexuiz's client; unset XONOTIC_DIR")
    directory.mkdir(parents=True, exist_ok=True)
    with steps.step("A real client joins, under a virtual display"):
        client = undo.enter_context(RealClient(lab, NEXUIZ, lab.paths.shared / NEXUIZ.name / "output"))
    number = itertools.count()

    def take(host: str) -> None:
        client.picture(directory / f"{next(number)}-{host}.png")
        if not client.plays:
            result.problems.append(f"the real client is not in the game any more, on {host}")

    return take


def play(lab: Lab, steps: Steps, undo: ExitStack, result: Result, **options: Any) -> None:
    """Start the game on the first host and the players in it, and go around."""
    console: Console = options["console"]
    service, files = chosen()
    first = HOSTS[0].name
    with steps.step(f"{service.name} with {BOTS} bots in a container on {first}"):
        workload = house(lab, service)
        if not options["keep"]:
            undo.callback(workloads.stop, lab, workload)
        if files:
            shutil.copytree(files, lab.paths.shared / service.name / XONOTIC_FILES)
        start(lab, service, workload, first)
    with steps.step(f"{result.players} players join"):
        players = undo.enter_context(Players(lab, service, result.players))
    with steps.step("The bots find their way about"):
        time.sleep(WARM_UP_S)
    steps.note(f"memory of the server: {memory_mb(lab.host(first), workload):.0f} MB")
    if options["watch"]:
        console.print(how_to_join(lab.name, service), highlight=False)
    look = photographer(lab, steps, undo, result, options["picture"])
    with Board(console, players.look) as board:
        pause_s = WATCHED_PAUSE_S if options["watch"] else PAUSE_S
        Round(lab, workload, players, board, options["mode"], pause_s, look).go(options["rounds"], result)
    seen = players.stop()["players"]
    result.count(seen)
    console.print(table(seen))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--name", default="xonotic", show_default=True, help="Name of the lab.")
@click.option("--players", type=click.IntRange(1, PLACES - BOTS), default=8, show_default=True)
@click.option("--rounds", type=click.IntRange(1, 1000), default=1, show_default=True, help="Times around all hosts.")
@click.option("--mode", type=click.Choice(MODES), default="auto", show_default=True, help="How memory is moved.")
@click.option("--watch", is_flag=True, help="Say how to join with a real client, and take time between the hops.")
@click.option(
    "--picture",
    type=click.Path(file_okay=False, path_type=Path),
    help="Have a real client join, and put pictures of its screen there, one on each host.",
)
@click.option("--keep", is_flag=True, help="Leave the lab up, with the server.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def cli(name: str, players: int, **options: Any) -> None:
    """Have a game with bots and players go around alpha → beta → gamma → alpha, and say what the players saw."""
    console = Console(stderr=True)
    steps = Steps(console)
    result = Result("", players)
    try:
        result.engine = chosen()[0].name
        with ExitStack() as undo:
            undo.enter_context(only_one(name))
            lab = undo.enter_context(lab_for_a_while(name, steps, keep=options["keep"], packages="nexuiz"))
            if note := limits.work_around(lab):
                steps.note(note)
            play(lab, steps, undo, result, console=console, **options)
    except LabError as error:
        result.problems.append(str(error))
    longest = max((hop.longest_silence_ms for hop in result.hops), default=0.0)
    told = f"{result.players} players, {result.dropped} dropped, {result.snapshots_lost} snapshots lost"
    if options["as_json"]:
        click.echo(json.dumps(result.to_json()))
    else:
        click.echo(f"{result.engine}: {told}, longest silence {longest:.0f} ms in {len(result.hops)} hops")
    for problem in result.problems:
        console.print(f"Error: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
    if options["keep"] and find(Paths(name)):
        console.print(f"The lab is up: labs/lab --name {name} status, and then: down", highlight=False)
    sys.exit(1 if result.problems else 0)


if __name__ == "__main__":
    entry.run(cli, "labs/xonotic")
