"""labs/bench: the command line. Exit status: 0 measured, 1 a move failed or a client noticed more than a pause,
2 usage, 130 interrupted."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import NoReturn, Protocol

import click
from rich.console import Console, RenderableType

from labs import entry
from labs.benchmarks.connections import ConnectionsBench
from labs.benchmarks.files import FilesBench
from labs.benchmarks.gap import GapBench
from labs.benchmarks.measure import Row
from labs.benchmarks.memory import Memory, MemoryBench
from labs.benchmarks.plain import LIMIT_S
from labs.benchmarks.session import Settings, kernel, load_average
from labs.benchmarks.tables import connections_table, files_table, gap_table, memory_tables
from labs.commands import LabError
from labs.lab_session import only_one
from labs.steps import Steps

FILE_COLUMNS = 160
MODES = ("auto", "stop-copy", "pre-copy", "post-copy", "hybrid")


class Benchmark(Protocol):
    """A benchmark that fills in what it finds, so that what there is can be shown when it is cut short."""

    def run(self, found: list[Row], problems: list[str], /) -> None: ...


def _counts(most: int) -> Callable[[click.Context, click.Parameter, str], tuple[int, ...]]:
    """Whole numbers above 0, separated by commas."""

    def parse(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
        parts = [part.strip() for part in text.split(",")]
        if not all(part.isdecimal() and 0 < int(part) <= most for part in parts):
            raise click.BadParameter(
                f"{text!r}: write whole numbers from 1 to {most}, with commas between them, like 64,512"
            )
        return tuple(int(part) for part in parts)

    return parse


def _shared(command: Callable[..., None]) -> Callable[..., None]:
    """The options that every benchmark has."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output."),
        click.option("--name", default="bench", show_default=True, help="Name of the benchmark's own lab."),
        click.option("--mode", type=click.Choice(MODES), default="auto", show_default=True, help="livemove's mode."),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Measure what clients notice of a migration.

    Every benchmark brings up a lab of its own, moves a service in it between two hosts, and takes the lab down, also on
    Ctrl-C. Progress goes to standard error, the table or the JSON object to standard output. Times depend on
    the machine and on what else it does: compare what was measured in one run.
    """


@cli.command("memory")
@click.option(
    "--sizes",
    callback=_counts(60_000),
    metavar="N,N,…",
    default="64,512,2048",
    show_default=True,
    help="Memory in MB.",
)
@click.option(
    "--shared",
    "memory",
    flag_value="shared",
    help="One anonymous shared mapping, as a database has; else private memory.",
)
@click.option("--memfd", "memory", flag_value="memfd", help="One memfd, mapped, with a descriptor that is written to.")
@click.option("--tmpfs", "memory", flag_value="tmpfs", help="One mapped file of the container's own /dev/shm.")
@click.option("--dirty-mb-s", type=click.FloatRange(0, 1000), default=10, show_default=True)
@click.option("--runs", type=click.IntRange(1, 50), default=5, show_default=True, help="Of which medians are shown.")
@_shared
def memory_command(
    *, sizes: tuple[int, ...], memory: Memory | None, dirty_mb_s: float, runs: int, mode: str, name: str, as_json: bool
) -> None:
    """Move a service with much memory, by livemove and plainly in turn.

    The service writes --dirty-mb-s into its memory and verifies it; a client asks every 2 ms over one connection. The
    plain move is runc checkpoint, tar through a pipe, the address, runc restore, with default options and images on
    tmpfs, every program started beforehand.

    \b
    Examples:
      labs/bench memory
      labs/bench memory --sizes 64 --runs 1 --mode stop-copy --json
    """
    steps, found = Steps(Console(stderr=True)), list[Row]()
    bench = MemoryBench(Settings(name, mode, steps), sizes, dirty_mb_s, runs, memory or "private")
    _run(bench, name, found, "cases", memory_tables, as_json=as_json)


@cli.command("gap")
@click.option("--hops", type=click.IntRange(1, 1000), default=20, show_default=True, help="Moves, there and back.")
@_shared
def gap_command(*, hops: int, mode: str, name: str, as_json: bool) -> None:
    """Move a small service there and back while two clients are at it.

    One asks every 2 ms over one connection; one opens a new connection every 5 ms, asks once and closes it. A packet
    capture on the segment counts resets and ICMP unreachable.

    \b
    Examples:
      labs/bench gap
      labs/bench gap --hops 4 --json
    """
    steps, found = Steps(Console(stderr=True)), list[Row]()
    _run(GapBench(Settings(name, mode, steps), hops), name, found, "hops", gap_table, as_json=as_json)


@cli.command("connections")
@click.option(
    "--counts",
    callback=_counts(60_000),
    metavar="N,N,…",
    default="10,100,1000,5000",
    show_default=True,
    help="Connections.",
)
@click.option("--limit-s", type=click.FloatRange(1, 600), default=LIMIT_S, show_default=True, help="Of a plain move.")
@_shared
def connections_command(*, counts: tuple[int, ...], limit_s: float, mode: str, name: str, as_json: bool) -> None:
    """Move many established connections, each checked byte by byte before and after.

    Once by livemove, and beside it plainly with CRIU's default network lock (iptables) and its nftables lock, as far
    as they finish in --limit-s. One question every 2 ms goes round over all connections; the longest gap is the
    longest time that one of them waited for its answer.

    \b
    Examples:
      labs/bench connections
      labs/bench connections --counts 10,100 --json
    """
    steps, found = Steps(Console(stderr=True)), list[Row]()
    bench = ConnectionsBench(Settings(name, mode, steps), counts, limit_s)
    _run(bench, name, found, "cases", connections_table, as_json=as_json)


@cli.command("files")
@click.option(
    "--counts",
    callback=_counts(1_000_000),
    metavar="N,N,…",
    default="10,100000",
    show_default=True,
    help="Files of the service.",
)
@click.option("--runs", type=click.IntRange(1, 50), default=5, show_default=True, help="Of which medians are shown.")
@_shared
def files_command(*, counts: tuple[int, ...], runs: int, mode: str, name: str, as_json: bool) -> None:
    """Move a service with its files there and back, with few of them and with many.

    It writes into four files all the time, and audits them. The first move, which copies everything, is not counted.

    \b
    Examples:
      labs/bench files
      labs/bench files --counts 10 --runs 1 --json
    """
    steps, found = Steps(Console(stderr=True)), list[Row]()
    _run(FilesBench(Settings(name, mode, steps), counts, runs), name, found, "cases", files_table, as_json=as_json)


def _run(
    bench: Benchmark,
    lab: str,
    found: list[Row],
    title: str,
    table: Callable[[list[Row]], RenderableType],
    *,
    as_json: bool,
) -> NoReturn:
    """Run a benchmark, show what it found, and end with the status that says how it went."""
    problems: list[str] = []
    machine: Row = {"cpus": os.cpu_count(), "kernel": kernel(), "load_before": load_average()}
    try:
        with only_one(lab):
            bench.run(found, problems)
    except LabError as error:
        problems.append(str(error))
    if as_json:
        click.echo(json.dumps({title: found, "machine": machine, **({"problems": problems} if problems else {})}))
    elif found:
        console = Console()
        # Into a file or a pipe no line is to be cut short.
        (console if console.is_terminal else Console(width=FILE_COLUMNS)).print(table(found))
    for problem in problems:
        Console(stderr=True).print(f"Error: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1 if problems else 0)


def main() -> None:
    """The command line."""
    entry.run(cli, "labs/bench")
