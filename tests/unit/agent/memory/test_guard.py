"""The guard as a process: it kills what it watches when the agent's end of the socket closes without ``done``."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from coordinator.agent.memory import guard

#: A root with a child of its own, which says its pid.
TREE = "sleep 1000 & echo $!; wait"


@dataclass
class Scene:
    """A filler, a tree of tasks, a guard, and the agent's end of its socket."""

    filler: subprocess.Popen[bytes]
    root: subprocess.Popen[bytes]
    child: int
    guard: subprocess.Popen[bytes]
    agent: socket.socket

    def watch(self, *, needs_agent: bool = True) -> bytes:
        """Have the guard watch, and return its answer."""
        self.agent.sendall(f"watch {self.filler.pid} {self.root.pid} {int(needs_agent)}\n".encode())
        return self.agent.recv(100)


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture
def scene() -> Iterator[Scene]:
    ours, theirs = socket.socketpair()
    filler = subprocess.Popen(
        ["sh", "-c", "trap 'exit 0' USR1; echo; while :; do sleep 0.1; done"], stdout=subprocess.PIPE
    )
    assert filler.stdout is not None
    assert filler.stdout.readline() == b"\n"
    root = subprocess.Popen(["sh", "-c", TREE], stdout=subprocess.PIPE)
    assert root.stdout is not None
    child = int(root.stdout.readline())
    with theirs:
        start = "import sys; sys.path[:0] = ['.']; from coordinator.agent.memory.guard import main; sys.exit(main())"
        command = [sys.executable, "-I", "-S", "-c", start, str(theirs.fileno())]
        watching = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdout=subprocess.DEVNULL)
    with closing(ours):
        yield Scene(filler, root, child, watching, ours)
    for process in (watching, root, filler):
        process.kill()
        process.wait()
    root.stdout.close()
    filler.stdout.close()
    if not gone(child):
        os.kill(child, 9)


def test_without_done_the_end_of_the_agent_is_the_end_of_the_tasks(scene: Scene) -> None:
    assert scene.watch() == b"watching\n"
    scene.agent.close()
    assert scene.guard.wait(20) == 1
    assert scene.root.wait(20) == -9
    assert gone(scene.child)
    assert scene.filler.wait(20) == -9  # it has nobody left to ask for pages, and nobody to give them to


def test_asked_for_it_ends_the_tasks(scene: Scene) -> None:
    scene.watch(needs_agent=False)
    scene.agent.sendall(b"end\n")
    assert scene.guard.wait(20) == 1
    assert scene.root.wait(20) == -9
    assert scene.filler.wait(20) == -9


@pytest.mark.parametrize("number", [0, 9])
def test_when_all_pages_are_here_nobody_needs_the_agent(scene: Scene, number: int) -> None:
    """The guard stays until the filler has ended, and does what it is there for if that is no good end."""
    scene.watch(needs_agent=False)
    scene.agent.close()
    scene.filler.send_signal(number or signal.SIGUSR1)
    assert scene.guard.wait(20) == (1 if number else 0)
    if number:
        assert scene.root.wait(20) == -9
    else:
        assert scene.root.poll() is None


def test_with_done_it_leaves_them_alone(scene: Scene) -> None:
    scene.watch()
    scene.agent.sendall(b"done\n")
    scene.agent.close()
    assert scene.guard.wait(20) == 0
    assert scene.root.poll() is None
    assert not gone(scene.child)


def test_before_it_is_told_whom_to_watch_it_kills_nobody(scene: Scene) -> None:
    scene.agent.close()
    assert scene.guard.wait(20) == 1
    assert scene.root.poll() is None


@pytest.mark.parametrize("number", [9, 15])
def test_a_filler_that_is_killed_takes_the_tasks_with_it(scene: Scene, number: int) -> None:
    scene.watch()
    scene.filler.send_signal(number)
    assert scene.root.wait(20) == -9
    assert scene.filler.wait(20) == -number
    assert scene.guard.poll() is None  # it waits for the agent


def test_a_filler_that_is_gone_already_is_not_confirmed(scene: Scene) -> None:
    """The tasks are still held at their hook: the agent gives up, and they are killed there."""
    scene.filler.kill()
    scene.filler.wait()
    assert scene.watch() == b""
    assert scene.guard.wait(20) == 1


def test_a_process_that_is_gone_has_no_tree_to_kill() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert guard.tree(process.pid) == [process.pid]
    guard.kill([process.pid])
