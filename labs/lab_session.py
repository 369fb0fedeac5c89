"""A lab of a command's own: nobody else's meanwhile, and taken down again."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from labs.commands import LabError
from labs.lab import Lab, down
from labs.state import Paths
from labs.steps import Steps


@contextmanager
def only_one(lab: str) -> Iterator[None]:
    """Two commands in one lab would take each other's service away. The name is free again when we end, however."""
    Paths(lab)  # says at once if that cannot be the name of a lab
    with socket.socket(socket.AF_UNIX) as name:
        try:
            name.bind(f"\0livemove-lab/{lab}")
        except OSError:
            raise LabError(f"the lab {lab!r} is in use by another command; wait for it, or name another lab") from None
        yield


@contextmanager
def lab_for_a_while(name: str, steps: Steps, *, keep: bool = False, packages: str = "base") -> Iterator[Lab]:
    """A lab that goes down again, whatever happens, even if it is only half up.

    With `keep` it stays, unless we are interrupted.
    """
    try:
        with steps.step("Lab up: hosts alpha, beta, gamma, the clients and the operator"):
            lab = Lab.up(name, steps.note, packages=packages)
        yield lab
    except (KeyboardInterrupt, SystemExit):
        keep = False
        raise
    finally:
        if not keep:
            _take_down(name, steps)


def _take_down(name: str, steps: Steps) -> None:
    # A second Ctrl-C would leave behind what the first one asked to have taken away. This takes a second.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with steps.step("Lab down"):
            down(Paths(name))
    finally:
        signal.signal(signal.SIGINT, before)
