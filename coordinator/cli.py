"""The command ``livemove``: one function a command, which parses, calls, renders and ends with an exit status.

Results go to standard output (``--json``: exactly one object, also for an error), progress and logs to standard error.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

import click
import uvloop
from rich.console import Console

import coordinator.doctor
from coordinator import __version__
from coordinator.announcing import import_meanwhile, probe_frames
from coordinator.config import GIVE_UPS, MODES, Configuration, configuration_path, load
from coordinator.errors import EXIT_MEANINGS, ExitCode, InDoubt, Interrupted, LivemoveError
from coordinator.events import EventSink
from coordinator.migration import migrate
from coordinator.recovery import recover, status
from coordinator.report import text
from coordinator.report.result import MigrationResult, error_json
from coordinator.report.terminal import Terminal
from coordinator.ssh import connect

_DEFECT = "This is a defect in livemove: please report it. `livemove status` shows where the service runs."
_EPILOG = "\b\nExit status:\n" + "\n".join(f"  {code.value:>3}  {meaning}" for code, meaning in EXIT_MEANINGS.items())


class Report(Protocol):
    """What every command ends with."""

    @property
    def exit_code(self) -> ExitCode:
        """Where the service is."""

    def to_json(self) -> dict[str, Any]:
        """The command's one JSON object."""


R = TypeVar("R", bound=Report)
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """The options before the command."""

    config: str | None
    verbose: bool


class Cli(click.Group):
    """A group whose usage errors too are one JSON object on standard output where ``--json`` was given."""

    def main(self, args: Any = None, *rest: Any, **settings: Any) -> Any:
        """Parse and run; ends the process with the exit status."""
        arguments = list(sys.argv[1:] if args is None else args)
        try:
            sys.exit(super().main(arguments, *rest, **{**settings, "standalone_mode": False}))
        except click.UsageError as error:
            error.show()
            if "--json" in arguments:
                told = {"code": "USAGE", "message": error.format_message(), "hint": "livemove COMMAND --help"}
                click.echo(json.dumps({"outcome": "usage", "exit_code": int(ExitCode.USAGE), "error": told}))
            sys.exit(ExitCode.USAGE)
        except click.Abort:
            sys.exit(ExitCode.INTERRUPTED)
        finally:
            gc.freeze()  # at its end Python would look through all that was imported, for 0.15 s


@click.group(cls=Cli, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", metavar="FILE", help="Configuration; else $LIVEMOVE_CONFIG, else ./livemove.toml.")
@click.option("--verbose", is_flag=True, help="Log every step to standard error.")
@click.version_option(__version__, prog_name="livemove")
@click.pass_context
def main(context: click.Context, config: str | None, verbose: bool) -> None:
    """Move a running network service to another host while its clients stay connected.

    \b
    Examples:
      livemove doctor
      livemove check counter --to beta
      livemove migrate counter --to beta
      livemove migrate counter --to beta --json 2>log
      livemove status
    """
    context.obj = Options(config, verbose)
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, stream=sys.stderr)


_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_to = click.option("--to", required=True, metavar="HOST", help="The destination.")


@main.command(epilog="\b\nExample:\n  livemove doctor alpha beta")
@click.argument("hosts", nargs=-1, metavar="[HOST]...")
@_json
@click.pass_obj
def doctor(options: Options, hosts: tuple[str, ...], as_json: bool) -> None:
    """Can these hosts (all, if none is named) take part in a move?"""
    _command(
        options,
        lambda config, sink: coordinator.doctor.doctor(config, hosts, connect=connect, sink=sink),
        text.show_doctor,
        as_json=as_json,
    )


@main.command(epilog="\b\nExample:\n  livemove check counter --to beta")
@click.argument("workload")
@_to
@_json
@click.pass_obj
def check(options: Options, workload: str, to: str, as_json: bool) -> None:
    """Would the move work? Names every reason why it would fail or lose something; changes nothing."""
    import_meanwhile()
    _command(
        options,
        lambda config, sink: coordinator.doctor.check(
            config, workload, to, connect=connect, probe_frames=probe_frames, sink=sink
        ),
        text.show_check,
        as_json=as_json,
    )


@main.command(
    "migrate",
    epilog="\b\nExamples:\n  livemove migrate counter --to beta\n  livemove migrate counter --to beta --dry-run --json",
)
@click.argument("workload")
@_to
@click.option("--dry-run", is_flag=True, help="Check and plan, and change nothing.")
@click.option("--mode", type=click.Choice(MODES), help="How memory is moved; else policy.mode, else auto.")
@click.option("--max-freeze", type=click.FloatRange(1, 86_400), metavar="MS", help="Pre-copy until this would do.")
@click.option("--give-up", type=click.Choice(GIVE_UPS), help="What to do when pre-copy does not converge.")
@_json
@click.option("--quiet", is_flag=True, help="No progress.")
@click.pass_obj
def migrate_command(
    options: Options,
    workload: str,
    to: str,
    *,
    dry_run: bool,
    mode: str | None,
    max_freeze: float | None,
    give_up: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Move a workload to a host: check, move, verify. Ctrl-C rolls back."""

    def move(config: Configuration, sink: EventSink) -> Coroutine[Any, Any, MigrationResult]:
        chosen = config.with_memory(mode=mode, max_freeze_ms=max_freeze, give_up=give_up)
        return migrate(chosen, workload, to, dry_run=dry_run, sink=sink)

    import_meanwhile()
    _command(
        options,
        move,
        text.show_migration,
        as_json=as_json,
        quiet=quiet,
        changes=True,
    )


@main.command("status")
@_json
@click.pass_obj
def status_command(options: Options, as_json: bool) -> None:
    """Where does each workload run, and what is unfinished?"""
    _command(options, lambda config, sink: status(config), text.show_status, as_json=as_json)


@main.command("recover", epilog="\b\nExample:\n  livemove recover 20261120T061500-counter-3f9a")
@click.argument("id")
@_json
@click.pass_obj
def recover_command(options: Options, id: str, as_json: bool) -> None:  # noqa: A002 - the argument's name in the usage
    """Finish or undo the migration ID after a crash."""
    _command(options, lambda config, sink: recover(config, id, sink), text.show_recovery, as_json=as_json, changes=True)


def _command(
    options: Options,
    work: Callable[[Configuration, EventSink], Coroutine[Any, Any, R]],
    show: Callable[[R, Console], None],
    *,
    as_json: bool,
    quiet: bool = False,
    changes: bool = False,
) -> NoReturn:
    """Load the configuration, do the work under a progress display, show its report, and exit with its status."""
    try:
        config = load(configuration_path(options.config, os.environ))
        with Terminal(Console(stderr=True), quiet=quiet, verbose=options.verbose) as terminal:
            report = _run(work(config, terminal), terminal.say)
    except LivemoveError as error:
        _fail(error, as_json=as_json)
    except Exception as defect:
        traceback.print_exc()
        message = f"{type(defect).__name__}: {defect}"
        # Before a change the service is untouched; in the middle of one, nobody knows.
        _fail(InDoubt(message, _DEFECT) if changes else LivemoveError(message, _DEFECT), as_json=as_json)
    if as_json:
        told = report.to_json()
        click.echo(json.dumps(told))
        if told.get("error"):
            text.show_told_error(told["error"], Console(stderr=True))
    else:
        show(report, Console())
    sys.exit(report.exit_code)


def _fail(error: LivemoveError, *, as_json: bool) -> NoReturn:
    text.show_error(error, Console(stderr=True))
    if as_json:
        click.echo(json.dumps(error_json(error)))
    sys.exit(error.exit_code)


def _run(work: Coroutine[Any, Any, T], say: Callable[[str], None]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(interruptible(work, say))


async def interruptible(work: Coroutine[Any, Any, T], say: Callable[[str], None]) -> T:
    """Do the work; the first SIGINT or SIGTERM cancels it once. ``migrate`` rolls back then and says how that ended,
    in its result or by ``Interrupted``; other commands just end."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    asked = False

    def interrupt() -> None:
        nonlocal asked
        if asked:
            say("the roll-back is under way")
            return
        asked = True
        say("interrupted: going back")
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        return await task
    except asyncio.CancelledError:
        raise Interrupted("interrupted", "`livemove status` shows where each workload runs.") from None
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
