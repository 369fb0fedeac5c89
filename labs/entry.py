"""How the lab's commands end: errors told once, and SIGTERM undone like Ctrl-C."""

from __future__ import annotations

import signal
import sys
from types import FrameType

import click


def run(command: click.Command, name: str) -> None:
    """Run a command line under its name; whatever it has brought up, its own context managers take down."""
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        command(prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print("Interrupted; everything was taken down.", file=sys.stderr)
        sys.exit(130)


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
