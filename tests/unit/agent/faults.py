"""Faults for a transaction in memory: what happens to it, at which of its awaits, verbs and messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from coordinator.agent.fakes.channel import Trouble
from coordinator.agent.fakes.clock import run
from coordinator.protocol import MemoryPolicy, Mode
from tests.unit.agent.stage import Process, Stage, lost, told_outcomes, verdict

Role = Literal["source", "destination"]
ROLES: tuple[Role, Role] = ("source", "destination")
Fault = Callable[[Stage], None]


@cache
def happy(mode: Mode = "stop-copy") -> Stage:
    """A move without a fault: how many steps and verbs each half has, and what they say to each other."""
    with TemporaryDirectory() as folder:
        stage = Stage(Path(folder), memory=MemoryPolicy(mode=mode))
        run(stage.play())
    return stage


def process(stage: Stage, role: Role) -> Process:
    return stage.source if role == "source" else stage.destination


def other(role: Role) -> Role:
    return "destination" if role == "source" else "source"


def steps(role: Role, mode: Mode = "stop-copy") -> range:
    return range(1, process(happy(mode), role).life.steps + 1)


def cancel(role: Role, step: int, then: Callable[[Process], None] = lambda _: None) -> Fault:
    """Cancel a half at one of its awaits, and after that something else."""

    def fault(stage: Stage) -> None:
        target = process(stage, role)

        def stop() -> None:
            target.cancel()
            then(target)

        target.life.stop_at, target.life.stop = step, stop

    return fault


def cancel_again(after: int) -> Callable[[Process], None]:
    def then(target: Process) -> None:
        target.life.stop_at, target.life.stop = target.life.steps + after, target.cancel

    return then


def kill_later(after: int) -> Callable[[Process], None]:
    def then(target: Process) -> None:
        target.life.stop_at, target.life.stop = target.life.steps + after, target.life.kill

    return then


def fail_later(after: int) -> Callable[[Process], None]:
    def then(target: Process) -> None:
        target.life.fail_at = len(target.life.verbs) + after

    return then


def kill(role: Role, step: int) -> Fault:
    """An agent's process ends at one of its awaits."""

    def fault(stage: Stage) -> None:
        process(stage, role).life.stop_at = step

    return fault


def fail(role: Role, verb: int) -> Fault:
    """A verb of an adapter fails once."""

    def fault(stage: Stage) -> None:
        process(stage, role).life.fail_at = verb

    return fault


def trouble(kind: Trouble, up: bool, at: int) -> Fault:
    """A message is lost, alone or with the link."""

    def fault(stage: Stage) -> None:
        stage.segment.trouble, stage.segment.up, stage.segment.at = kind, up, at

    return fault


def both(*faults: Fault) -> Fault:
    def fault(stage: Stage) -> None:
        for each in faults:
            each(stage)

    return fault


@contextmanager
def noted(name: str, stage: Stage) -> Iterator[None]:
    """A failure tells which fault it was, and what happened then."""
    try:
        yield
    except BaseException as error:
        error.add_note("\n".join([f"with this fault: {name}", *stage.world.history, *stage.world.broken]))
        raise


def play(
    folder: Path, faults: Iterator[tuple[str, Fault]], mode: Mode = "stop-copy"
) -> Iterator[tuple[str, Stage, str]]:
    """Each fault in a world of its own: its name, the stage afterwards, and the verdict, which all halves share."""
    for number, (name, fault) in enumerate(faults):
        stage = Stage(folder / str(number), memory=MemoryPolicy(mode=mode))
        fault(stage)
        with noted(name, stage):
            ends = run(stage.play())
            found = lost(stage, ends) if stage.world.killed and stage.world.committed else verdict(stage)
            assert found == "lost" or told_outcomes(ends) <= {found}
        yield name, stage, found
