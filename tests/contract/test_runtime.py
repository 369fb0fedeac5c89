"""One suite for runtimes: the fake, a plain process tree, and real containers on a host of the lab."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

import labs.config
from coordinator.agent.fakes.runtime import ROOT_PID, FakeRuntime
from coordinator.agent.fakes.world import Life, World
from coordinator.agent.runtimes.base import Runtime, Tasks
from coordinator.agent.runtimes.oci import OciRuntime, stray_processes
from coordinator.agent.runtimes.podman import PodmanRuntime
from coordinator.agent.runtimes.process_tree import ProcessTree, taken_pids
from coordinator.errors import ProtocolError, RestoreFailed
from coordinator.facts import CONTAINER_RUNTIMES, OCI_RUNTIMES, RuntimeName, WorkloadSpec
from labs import oci, podman
from labs.machines import Host
from tests.integration.faults import until
from tests.shared_lab import running_lab
from tests.unit.agent.stage import make_plan


class Subject(Protocol):
    """A runtime, and the workload it is asked about."""

    @property
    def runtime(self) -> Runtime:
        """The runtime under test."""

    @property
    def known_by(self) -> str:
        """How the command that dumps it names the workload."""

    def end(self) -> None:
        """The workload's tasks die."""


@dataclass
class Fake:
    """The workload of the world, on its source."""

    world: World

    def __post_init__(self) -> None:
        self.runtime: Runtime = FakeRuntime(Life(self.world, self.world.source))
        self.known_by = str(ROOT_PID)

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
        self.known_by = str(self.process.pid)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Contained:
    """A `sleep` in a container on a host of the lab, whose runtime is first in our PATH."""

    host: Host
    program: RuntimeName
    known_by: str = "contract"

    def __post_init__(self) -> None:
        bundle = f"/srv/{self.known_by}"
        self.runtime: Runtime = OciRuntime(self.program, self.known_by, bundle)
        config = oci.config(name=self.known_by, hostname="w", command=["sleep", "1000"], environment={})
        self.host.run(["sh", "-c", f"mkdir -p {bundle}/rootfs && mount --bind / {bundle}/rootfs"])
        self.host.write_file(f"{bundle}/config.json", json.dumps(config))
        run = f"{self.program} run --detach --bundle {bundle} {self.known_by} {SILENT}"
        self.host.run(["sh", "-c", run])

    def end(self) -> None:
        self.host.run([self.program, "kill", self.known_by, "KILL"])
        until(lambda: self.state() == "stopped", "a container that was killed is stopped")

    def state(self) -> str:
        return str(json.loads(self.host.run([self.program, "state", self.known_by]).stdout)["status"])

    def remove(self) -> None:
        self.host.run([self.program, "delete", "--force", self.known_by], check=False)
        self.host.run(["sh", "-c", f"umount /srv/{self.known_by}/rootfs && rm -r /srv/{self.known_by}"])


@dataclass
class InPodman:
    """The same under podman."""

    host: Host

    def __post_init__(self) -> None:
        self.spec = labs.config.Workload("contract", "podman", (), container="contract")
        self.runtime: Runtime = PodmanRuntime(
            WorkloadSpec(name="w", runtime="podman", addresses=(), container="contract")
        )
        podman.install(self.host, self.spec, ["sleep", "1000"], {})
        self.host.run(["podman", "start", "contract"])
        self.known_by = self.host.run(["podman", "inspect", "--format", "{{.Id}}", "contract"]).stdout.strip()

    def end(self) -> None:
        self.host.run(["podman", "kill", "contract"])
        until(lambda: podman.status(self.host, "contract") == "exited", "a container that was killed has ended")

    def remove(self) -> None:
        podman.uninstall(self.host, self.spec)


def reach(host: Host, program: str, folder: Path) -> None:
    """A command of that name in a folder that is that of a host of the lab."""
    command = folder / program
    command.write_text(f'#!/bin/sh\nexec {shlex.join(host.command([program]))} "$@"\n')
    command.chmod(0o700)


SILENT = "</dev/null >/dev/null 2>&1"
#: What a runtime knows a container by.
STATE_FILES = {"runc": "/run/runc/{}/state.json", "crun": "/run/crun/{}/status"}


def spec(*, pid_file: str | None = None, root_pid: int | None = None) -> WorkloadSpec:
    return WorkloadSpec(name="w", runtime="process", addresses=(), pid_file=pid_file, root_pid=root_pid)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with running_lab("extra", "runtimes") as lab:
        yield lab.host("alpha")


@contextmanager
def containing(host: Host, program: RuntimeName, folder: Path) -> Iterator[Contained | InPodman]:
    """A container for one test."""
    for each in CONTAINER_RUNTIMES:
        reach(host, each, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        made = InPodman(host) if program == "podman" else Contained(host, program)
        try:
            yield made
        finally:
            made.remove()


@pytest.fixture(params=OCI_RUNTIMES)
def contained(request: pytest.FixtureRequest, host: Host, tmp_path: Path) -> Iterator[Contained]:
    with containing(host, request.param, tmp_path) as made:
        assert isinstance(made, Contained)
        yield made


@pytest.fixture(params=["fake", "process tree", *CONTAINER_RUNTIMES])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    if request.param == "fake":
        yield Fake(World(tmp_path, make_plan()))
        return
    if request.param in CONTAINER_RUNTIMES:
        with containing(request.getfixturevalue("host"), request.param, tmp_path) as made:
            yield made
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
    assert subject.known_by in subject.runtime.dump_command(tasks, images, work, lazy=False).argv


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


async def test_real_only_a_container_that_is_paused_does_not_run(contained: Contained) -> None:
    contained.host.run([contained.program, "pause", contained.known_by])
    assert await contained.runtime.find() == Tasks("stopped")
    contained.host.run([contained.program, "resume", contained.known_by])
    assert (await contained.runtime.find()).state == "running"


async def test_real_only_a_runtime_that_lost_its_state_file(contained: Contained) -> None:
    """It knows of nothing, and lets what it has be removed: what runs in the container is told by its control group."""
    contained.host.run(["rm", STATE_FILES[contained.program].format(contained.known_by)])
    assert await contained.runtime.find() == Tasks("absent")
    await contained.runtime.discard()
    group = f"/sys/fs/cgroup/{contained.known_by}"
    assert contained.host.read_file(f"{group}/cgroup.procs").split()
    contained.host.run(["sh", "-c", f"echo 1 >{group}/cgroup.kill"])
    until(lambda: contained.host.read_file(f"{group}/cgroup.procs") == "", "the control group is empty")
    contained.host.run(["rmdir", group])


def test_real_only_what_is_left_in_a_control_group(tmp_path: Path) -> None:
    config, group = tmp_path / "config.json", tmp_path / "unified/a/b"
    group.mkdir(parents=True)
    (tmp_path / "unified/cgroup.controllers").touch()
    (group / "cgroup.procs").write_text("7\n5\n")
    for linux, left in [({"cgroupsPath": "/a"}, [5, 7]), ({}, [5, 7]), ({"cgroupsPath": "/b"}, [])]:
        config.write_text(json.dumps({"linux": linux}))
        assert stray_processes(tmp_path, "a", tmp_path) == left
    for text in ["", "{}", '{"linux": {"cgroupsPath": "s:p:a"}}', '{"linux": {"cgroupsPath": "/../a"}}']:
        config.write_text(text)
        assert stray_processes(tmp_path, "a", tmp_path) == []
