"""One suite for runtimes: the fake, and a plain process tree with a real process."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from coordinator.agent.fakes.host import FakeRuntime
from coordinator.agent.fakes.world import Life, World
from coordinator.agent.runtimes.base import Runtime
from coordinator.agent.runtimes.process_tree import ProcessTree, taken_pids
from coordinator.errors import ProtocolError, RestoreFailed
from coordinator.facts import WorkloadSpec
from tests.unit.agent.stage import make_plan


class Subject(Protocol):
    """A runtime, and the workload it is asked about."""

    @property
    def runtime(self) -> Runtime:
        """The runtime under test."""

    def end(self) -> None:
        """The workload's tasks die."""


@dataclass
class Fake:
    """The workload of the world, on its source."""

    world: World

    def __post_init__(self) -> None:
        self.runtime: Runtime = FakeRuntime(Life(self.world, self.world.source))

    def end(self) -> None:
        self.world.source.copy = "absent"


@dataclass
class Real:
    """A `sleep` with a pid file."""

    process: subprocess.Popen[bytes]
    pid_file: Path

    def __post_init__(self) -> None:
        self.pid_file.write_text(f"{self.process.pid}\n")
        self.runtime: Runtime = ProcessTree(spec(pid_file=str(self.pid_file)), (self.process.pid,))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def spec(*, pid_file: str | None = None, root_pid: int | None = None) -> WorkloadSpec:
    return WorkloadSpec(name="w", runtime="process", addresses=(), pid_file=pid_file, root_pid=root_pid)


@pytest.fixture(params=["fake", "process tree"])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    if request.param == "fake":
        yield Fake(World(tmp_path, make_plan()))
        return
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield Real(process, tmp_path / "service.pid")
        process.kill()


async def test_what_runs_is_found_and_adopted(subject: Subject) -> None:
    tasks = await subject.runtime.find()
    assert tasks.state == "running"
    assert await subject.runtime.adopt() == tasks.root_pid > 0
    assert await subject.runtime.adopt() == tasks.root_pid
    assert await subject.runtime.find() == tasks


async def test_what_runs_here_cannot_be_restored_here(subject: Subject) -> None:
    with pytest.raises(RestoreFailed):
        await subject.runtime.prepare_restore()


async def test_what_does_not_run_cannot_be_adopted(subject: Subject) -> None:
    subject.end()
    assert (await subject.runtime.find()).state in ("stopped", "absent")
    assert (await subject.runtime.find()).root_pid == 0
    with pytest.raises(RestoreFailed):
        await subject.runtime.adopt()


async def test_what_is_forgotten_is_not_known_any_more(subject: Subject) -> None:
    subject.end()
    await subject.runtime.forget()
    await subject.runtime.forget()
    assert (await subject.runtime.find()).state == "absent"
    await subject.runtime.discard()
    await subject.runtime.discard()


async def test_commands_name_the_folders(subject: Subject) -> None:
    tasks = await subject.runtime.find()
    images, work = Path("/run/images"), Path("/run/work")
    for command in (
        subject.runtime.dump_command(tasks, images, work, lazy=False),
        subject.runtime.restore_command(images, work, lazy=False),
    ):
        assert {str(images), str(work)} <= set(command.argv)
    assert str(tasks.root_pid) in subject.runtime.dump_command(tasks, images, work, lazy=False).argv


async def test_real_only_adopting_writes_the_pid_file(tmp_path: Path) -> None:
    pid_file = tmp_path / "service.pid"
    runtime = ProcessTree(spec(pid_file=str(pid_file)), (os.getpid(),))
    assert (await runtime.find()).state == "absent"
    await runtime.adopt()
    assert pid_file.read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "1"])
async def test_real_only_a_pid_file_that_names_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "service.pid").write_text(text)
    assert (await ProcessTree(spec(pid_file=str(tmp_path / "service.pid"))).find()).state == "absent"


async def test_real_only_a_root_pid_needs_no_file() -> None:
    runtime = ProcessTree(spec(root_pid=os.getpid()), (os.getpid(),))
    assert (await runtime.find()).root_pid == os.getpid()
    await runtime.adopt()
    await runtime.forget()
    assert taken_pids((os.getpid(), 2**22 + 1)) == [os.getpid()]


def test_real_only_a_workload_is_known_by_one_thing() -> None:
    for wrong in (spec(), spec(pid_file="/x", root_pid=7)):
        with pytest.raises(ProtocolError, match="pid_file or a root_pid"):
            ProcessTree(wrong)
