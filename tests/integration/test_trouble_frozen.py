"""Trouble in the middle of a move, most of it while the service is frozen: it runs on, on one host, for every client.

The freeze is made to stand still: the source has dumped and sent everything, and the destination's CRIU waits for us.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from signal import SIGINT, SIGKILL, SIGTERM, Signals

import pytest

from labs.lab import Lab
from labs.machines import Host
from labs.workloads import listening_pids
from tests.integration.command import MIGRATION_FIELDS, Livemove, Said, livemove, migrate
from tests.integration.faults import (
    Hold,
    agents,
    drop_session,
    held_criu,
    held_runc,
    kill_agent,
    last_phase,
    signal_agent,
    until,
)
from tests.integration.scene import CONNECTIONS, Scene
from tests.integration.stage import Stage

SERVICE = "counter"
FINISHED = {"RELEASED", "ROLLED_BACK"}


@pytest.fixture(scope="module")
def stage(lab: Lab) -> Iterator[Stage]:
    with Stage(lab, SERVICE) as stage:
        yield stage


@pytest.fixture
def scene(stage: Stage) -> Iterator[Scene]:
    with stage.scene() as scene:
        yield scene


#: The mode in which the destination's agent has no memory of the service after the commit: in the others its death
#: before all pages are in the tasks is theirs (docs/how-it-works.md), which test_memory.py shows.
WITHOUT_AGENT = ("--mode", "stop-copy")


@contextmanager
def frozen(lab: Lab, *options: str) -> Iterator[tuple[Livemove, Hold]]:
    """A move to beta that stands still in the middle of the freeze."""
    with (
        held_criu(lab.host("beta")) as hold,
        Livemove(lab, "migrate", SERVICE, "--to", "beta", "--json", *options) as move,
    ):
        hold.reached(move)
        yield move, hold


def check_ended(said: Said, status: int, outcome: str, code: str | None) -> None:
    assert (said.status, said.report["outcome"], said.code) == (status, outcome, str(code)), said.stderr
    assert set(said.report) == MIGRATION_FIELDS
    assert said.report["exit_code"] == status
    assert "Traceback" not in said.stderr
    if outcome == "moved":
        assert said.report["connections"] == {"established": CONNECTIONS, "restored": CONNECTIONS}
    if code is not None:
        assert said.report["error"]["message"]
        assert said.report["error"]["hint"]
        assert said.stderr.count(f" {code}: ") >= 1


@pytest.mark.parametrize("runtime", ["counter", "echo"])
def test_a_restore_that_fails(lab: Lab, runtime: str) -> None:
    """A library that the service has mapped is of another size on the destination."""
    scene = Scene.start(lab, runtime)
    try:
        with another_library(lab.host(scene.host), lab.host("beta"), scene):
            scene.begin_hop()
            said = migrate(lab, runtime, "beta")
        check_ended(said, 4, "rolled_back", "RESTORE_FAILED")
        assert "bad size" in said.report["error"]["message"]
        scene.unharmed("alpha")
    finally:
        scene.close()


@contextmanager
def another_library(source: Host, destination: Host, scene: Scene) -> Iterator[None]:
    (pid,) = listening_pids(source, scene.workload)
    maps = source.read_file(f"/proc/{pid}/maps").splitlines()
    library = next(path for path in (line.split()[-1] for line in maps) if "lib-dynload" in path)
    destination.run(["cp", "-p", library, f"{library}.kept"])
    destination.run(["sh", "-c", 'echo >>"$0"', library])
    try:
        yield
    finally:
        destination.run(["mv", f"{library}.kept", library])


def test_the_destination_agent_is_killed(lab: Lab, scene: Scene) -> None:
    with frozen(lab) as (move, hold):
        kill_agent(lab.host("beta"))
        hold.go()
        said = move.finish()
    check_ended(said, 4, "rolled_back", "AGENT_LOST")
    assert "beta, the destination" in said.report["error"]["message"]
    scene.unharmed("alpha")


def test_the_source_agent_is_killed(lab: Lab, scene: Scene) -> None:
    with frozen(lab) as (move, hold):
        kill_agent(lab.host("alpha"))
        hold.go()
        said = move.finish()
    check_ended(said, 4, "rolled_back", "AGENT_LOST")
    assert "alpha, the source" in said.report["error"]["message"]
    scene.unharmed("alpha")


def test_the_source_agent_is_killed_when_the_destination_waits_for_its_decision(lab: Lab, scene: Scene) -> None:
    """The destination has said STAGED and must not guess: it asks what the source's journal says."""
    with frozen(lab) as (move, hold):
        signal_agent(lab.host("alpha"), "STOP")
        hold.go()
        until(lambda: last_phase(lab.host("beta"), "destination") == "STAGED", "STAGED on beta")
        kill_agent(lab.host("alpha"))
        said = move.finish()
    check_ended(said, 4, "rolled_back", "AGENT_LOST")
    scene.unharmed("alpha")


@pytest.mark.parametrize(("host", "verb"), [("alpha", "state"), ("beta", "state"), ("alpha", "delete")])
def test_an_agent_is_killed_after_the_commit(lab: Lab, scene: Scene, host: str, verb: str) -> None:
    """Committed, and held when the destination asks its runtime for the tasks (`state`), or when the source has it
    forget them (`delete`): the move is finished by what the journals say, and never undone (I3)."""
    with ExitStack() as holds:
        move, criu = holds.enter_context(frozen(lab, *(WITHOUT_AGENT if host == "beta" else ())))
        runc = holds.enter_context(held_runc(lab.host("alpha" if verb == "delete" else "beta"), verb))
        criu.go()
        runc.reached(move)
        kill_agent(lab.host(host))
        runc.go()
        said = move.finish()
    check_ended(said, 0, "moved", None)
    scene.unharmed("beta")


def test_the_destination_agent_is_killed_when_all_but_its_own_cleaning_up_is_done(lab: Lab, scene: Scene) -> None:
    with frozen(lab, *WITHOUT_AGENT) as (move, hold):
        hold.go()
        until(lambda: last_phase(lab.host("beta"), "destination") == "RESUMED", "RESUMED on beta")
        kill_agent(lab.host("beta"))
        said = move.finish()
    check_ended(said, 0, "moved", None)
    scene.unharmed("beta")


@pytest.mark.parametrize("host", ["alpha", "beta"])
def test_the_session_to_a_host_drops(lab: Lab, scene: Scene, host: str) -> None:
    """The switch-over is between the two agents: it goes on without the coordinator, which asks afterwards."""
    with frozen(lab) as (move, hold):
        drop_session(lab.host(host))
        hold.go()
        said = move.finish()
    check_ended(said, 0, "moved", None)
    scene.unharmed("beta")


def test_both_sessions_drop(lab: Lab, scene: Scene) -> None:
    with frozen(lab) as (move, hold):
        drop_session(lab.host("alpha"))
        drop_session(lab.host("beta"))
        hold.go()
        said = move.finish()
    check_ended(said, 0, "moved", None)
    scene.unharmed("beta")


@pytest.mark.parametrize("number", [SIGINT, SIGTERM])
def test_interrupted_in_the_freeze(lab: Lab, scene: Scene, number: Signals) -> None:
    with frozen(lab) as (move, hold):
        move.signal(number)
        scene.answers(CONNECTIONS)  # at once, while the destination's CRIU is still where it was
        hold.go()
        said = move.finish()
    check_ended(said, 130, "interrupted", "INTERRUPTED")
    scene.unharmed("alpha")


@pytest.mark.parametrize("number", [SIGINT, SIGTERM])
def test_interrupted_before_the_freeze(lab: Lab, scene: Scene, number: Signals) -> None:
    """Both halves are prepared and the source's CRIU is being loaded."""
    with (
        held_criu(lab.host("alpha")) as hold,
        Livemove(lab, "migrate", SERVICE, "--to", "beta", "--json") as move,
    ):
        hold.reached(move)
        move.signal(number)
        move.said("asking the source to go back")
        hold.go()
        said = move.finish()
    check_ended(said, 130, "interrupted", "INTERRUPTED")
    scene.unharmed("alpha")


def test_interrupted_while_checking(lab: Lab, scene: Scene) -> None:
    with Livemove(lab, "--verbose", "migrate", SERVICE, "--to", "beta", "--json") as move:
        move.said("alpha: connect completed")
        move.signal(SIGINT)
        said = move.finish()
    assert (said.status, said.code, said.report["outcome"]) == (130, "INTERRUPTED", "interrupted")
    assert "Traceback" not in said.stderr
    scene.unharmed("alpha")


def finished(lab: Lab, *halves: tuple[str, str]) -> Callable[[], bool]:
    return lambda: all(last_phase(lab.host(host), role) in FINISHED for host, role in halves)


def status(lab: Lab) -> tuple[list[str], list[tuple[str, str]]]:
    """What `livemove status` says: where the service runs, and (id, host) of what is unfinished."""
    said = livemove(lab, "status", "--json")
    assert said.status == 0, said.stderr
    where = {each["name"]: each["running_on"] for each in said.report["workloads"]}
    return where[SERVICE], [(each["id"], each["host"]) for each in said.report["unfinished"]]


def recover(lab: Lab, migration: str, outcome: str) -> None:
    said = livemove(lab, "recover", migration, "--json")
    assert (said.status, said.report["outcome"], said.report["error"]) == (0, outcome, None), said.stderr


def test_the_coordinator_is_killed(lab: Lab, scene: Scene) -> None:
    """The move ends by itself."""
    with frozen(lab) as (move, hold):
        move.signal(SIGKILL)
        assert move.finish().status == -SIGKILL
        where, unfinished = status(lab)
        migration = unfinished[0][0]
        assert sorted(unfinished) == [(migration, "alpha"), (migration, "beta")]
        assert where == ["alpha"]
        hold.go()
        until(finished(lab, ("alpha", "source"), ("beta", "destination")), "the end of the move")
    assert status(lab) == (["beta"], [])
    recover(lab, migration, "moved")
    scene.unharmed("beta")


@pytest.mark.parametrize("host", ["alpha", "beta"])
def test_the_coordinator_and_an_agent_are_killed(lab: Lab, scene: Scene, host: str) -> None:
    """Nobody is left who could clean up on that host: `livemove recover` does."""
    with frozen(lab) as (move, hold):
        move.signal(SIGKILL)
        assert move.finish().status == -SIGKILL
        kill_agent(lab.host(host))
        hold.go()
        other = ("beta", "destination") if host == "alpha" else ("alpha", "source")
        until(finished(lab, other), f"the end of the half on {other[0]}")
        until(lambda: not agents(lab.host(other[0])), f"the end of the agent on {other[0]}")
    where, unfinished = status(lab)
    assert where == ["alpha"]
    assert [each for _, each in unfinished] == [host]
    recover(lab, unfinished[0][0], "rolled_back")
    assert status(lab) == (["alpha"], [])
    scene.unharmed("alpha")


def test_a_journal_keeps_the_story_of_a_move_that_failed(lab: Lab, scene: Scene) -> None:
    with frozen(lab) as (move, hold):
        move.signal(SIGINT)
        hold.go()
        migration = move.finish().report["id"]
    lines = lab.host("alpha").read_file(f"/var/lib/livemove/{migration}/source.jsonl").splitlines()
    phases = [record["phase"] for record in map(json.loads, lines) if record["kind"] == "phase"]
    assert phases == ["PREPARED", "COPYING", "DIVERTED", "FROZEN", "DUMPED", "ABORTED", "ROLLED_BACK"]
    scene.unharmed("alpha")
