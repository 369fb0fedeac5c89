"""What the commands of `netfix` share: options, running, printing, errors."""

import json
import sys
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import NetfixError

Runner = Callable[[Coroutine[Any, Any, Any]], Any]
Result = dict[str, Any]

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> None:
    """Print rows under headings, not wrapped."""
    shown = Table(box=None, pad_edge=False, caption=caption or None, caption_justify="left")
    for column in columns:
        shown.add_column(column, no_wrap=True)
    for row in rows:
        shown.add_row(*map(escape, row))
    # Too wide for the terminal is better than cut off: what is printed may be copied.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(shown)


def answer(
    run: Runner, work: Callable[[], Coroutine[Any, Any, Result]], render: Callable[[Result], None], as_json: bool
) -> None:
    """Run a command's work and print its result; a NetfixError becomes message, hint and exit status."""
    try:
        result = run(work())
    except NetfixError as error:
        fail(error, as_json)
    if as_json:
        click.echo(json.dumps(result))
    else:
        render(result)


def fail(error: NetfixError, as_json: bool) -> NoReturn:
    """Print an error and end with its exit status."""
    if as_json:
        click.echo(json.dumps({"error": {"code": error.code, "message": error.message, "hint": error.hint}}))
    click.echo(f"netfix: {error.message} [{error.code}]", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)
    raise click.exceptions.Exit(error.exit_status)
