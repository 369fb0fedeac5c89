"""The lab's one door to other programs, and its one error."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence


class LabError(Exception):
    """Something the lab could not do: what, where, and what to do about it."""


def failure(argv: Sequence[str], status: int, output: str) -> LabError:
    """A failed command as one message: the command to paste, its exit status, and what it said last."""
    said = "\n".join(f"  {line}" for line in output.strip().splitlines()[-8:])
    return LabError(f"exit status {status} from: {shlex.join(argv)}" + (f"\n{said}" if said else ""))


def run(
    argv: Sequence[str],
    *,
    check: bool = True,
    input: str | None = None,  # noqa: A002 - as subprocess.run calls it
    timeout: float = 60,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and keep what it said; with `check`, a failure is a LabError."""
    try:
        done = subprocess.run(argv, input=input, capture_output=True, text=True, timeout=timeout, check=False)
    except FileNotFoundError as error:
        raise LabError(f"{argv[0]} is not installed; run labs/lab or labs/demo, which install it") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"not done after {timeout:g} s: {shlex.join(argv)}") from error
    if check and done.returncode != 0:
        raise failure(argv, done.returncode, done.stderr or done.stdout)
    return done
