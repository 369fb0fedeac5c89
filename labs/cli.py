"""labs/lab: several Linux hosts on one machine.

Exit status: 0 done, 1 not done, 2 usage, 3 `status`: the lab is not up; `exec`, `ssh` and `shell`: the command's own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.table import Table

from labs import lab as labs
from labs.commands import LabError
from labs.lab import Lab
from labs.root import EXTRAS
from labs.state import Paths

EXIT_NOT_UP = 3
stderr = Console(stderr=True, highlight=False)
passed_on = click.argument("command", nargs=-1, type=click.UNPROCESSED)
# Everything after the machine's name is the command's, options and all.
COMMAND_SETTINGS: dict[str, Any] = {"allow_interspersed_args": False}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--name", envvar="LIVEMOVE_LAB", default="lab", show_default=True, help="Which lab.")
@click.pass_context
def cli(context: click.Context, name: str) -> None:
    """Several Linux hosts, clients and an operator machine on one Ethernet segment, all on this machine."""
    context.obj = Paths(name)


@cli.command()
@click.option(
    "--packages", type=click.Choice(tuple(EXTRAS)), default="base", show_default=True, help="What hosts have installed."
)
@click.pass_obj
def up(paths: Paths, packages: str) -> None:
    """Build the lab; nothing happens if it is up."""
    started = time.monotonic()
    running = labs.find(paths)
    if running is not None:
        running.with_packages(packages)
        stderr.print(f"Lab {paths.name!r} is up already: {paths.config}")
        return
    with stderr.status("Building the lab"):
        Lab.up(paths.name, lambda step: stderr.print(f"• {step}"), packages=packages)
    stderr.print(f"Lab {paths.name!r} is up after {time.monotonic() - started:.1f} s: {paths.config}")


@cli.command()
@click.pass_obj
def down(paths: Paths) -> None:
    """Take the lab down; nothing is left of it."""
    was_there = labs.down(paths)
    stderr.print(f"Lab {paths.name!r} is down" if was_there else f"Lab {paths.name!r} was not up")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@click.pass_obj
def status(paths: Paths, as_json: bool) -> None:
    """Show the machines and their addresses."""
    lab = labs.find(paths)
    state = "up" if lab else "broken" if labs.exists(paths) else "down"
    machines = [
        {
            "name": machine.name,
            "address": machine.address,
            "address6": machine.address6,
            "mac": machine.mac,
            "init_pid": getattr(machine, "init_pid", None),
        }
        for machine in (lab.machines.values() if lab else ())
    ]
    if as_json:
        config = str(paths.config) if lab else None
        click.echo(json.dumps({"name": paths.name, "state": state, "config": config, "machines": machines}))
    else:
        table = Table("machine", "address", "", "MAC", "init", box=None, title=None)
        for machine in machines:
            table.add_row(*(str(value or "") for value in machine.values()))
        click.echo(f"Lab {paths.name!r} is {state}")
        if lab:
            Console().print(table)
    sys.exit(0 if lab else EXIT_NOT_UP)


@cli.command("exec", context_settings=COMMAND_SETTINGS)
@click.argument("machine")
@passed_on
@click.pass_obj
def execute(paths: Paths, machine: str, command: tuple[str, ...]) -> None:
    """Run a command on a machine: labs/lab exec alpha -- ip address"""
    argv = _without_dashes(command)
    if not argv:
        raise click.UsageError(f"what to run? Write: labs/lab exec {machine} -- COMMAND")
    _become(Lab.attach(paths.name).machine(machine).command(argv))


@cli.command(context_settings=COMMAND_SETTINGS)
@click.argument("host")
@passed_on
@click.pass_obj
def ssh(paths: Paths, host: str, command: tuple[str, ...]) -> None:
    """Log in to a host from the operator machine."""
    lab = Lab.attach(paths.name)
    _become(lab.machine("operator").command(lab.host(host).ssh_command(_without_dashes(command))))


@cli.command()
@click.pass_obj
def shell(paths: Paths) -> None:
    """The operator's shell: where livemove runs, with LIVEMOVE_CONFIG set to the lab's configuration."""
    lab = Lab.attach(paths.name)
    programs = Path(sys.executable).parent
    os.environ["PATH"] = f"{programs}:{os.environ['PATH']}"
    os.environ["LIVEMOVE_CONFIG"] = str(lab.config_path)
    os.environ["LIVEMOVE_LAB"] = lab.name
    stderr.print(f"Operator machine of lab {lab.name!r}; hosts: alpha, beta, gamma. Leave with: exit")
    _become(lab.machine("operator").command([os.environ.get("SHELL", "/bin/bash")]))


def _without_dashes(command: tuple[str, ...]) -> tuple[str, ...]:
    return command[1:] if command[:1] == ("--",) else command


def _become(command: list[str]) -> NoReturn:
    os.execvp(command[0], command)


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """The command line, with the lab's errors as messages and SIGTERM undone like Ctrl-C."""
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        cli(prog_name="labs/lab")
    except LabError as error:
        stderr.print(f"Error: {error}", style="red", markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
