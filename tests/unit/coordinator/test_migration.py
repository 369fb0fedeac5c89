"""The coordinator's story over two hosts in memory: interrupted at every stage, with lost sessions and failing halves.

`migrate` and `recover` are the real ones, and so are the agents behind the sessions (see tests/unit/agent/stage.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

from coordinator.agent.fakes.clock import run
from coordinator.agent.half import Half
from coordinator.config import Configuration, Host
from coordinator.errors import DeadlineExceeded, ExitCode, HostUnreachable, Interrupted, SessionLost, UnknownMigration
from coordinator.events import Event, EventSink
from coordinator.journal import Phase, read_state
from coordinator.migration import migrate
from coordinator.protocol import (
    Abort,
    DescribeWorkload,
    ListMigrations,
    Mode,
    PrepareDestination,
    PrepareSource,
    Recover,
    Request,
    RunHalf,
)
from coordinator.recovery import recover
from coordinator.report.result import MigrationResult
from tests.unit.agent.stage import Process, Stage, phase_of, verdict
from tests.unit.coordinator.samples import configuration, hosts

R = TypeVar("R")
TO_AGENTS = (PrepareDestination, PrepareSource, RunHalf, Abort, Recover, ListMigrations)


class Session:
    """A session whose transaction is with an agent in memory, and whose facts are the samples'."""

    def __init__(self, lab: Lab, host: Host) -> None:
        self.host = host
        self._lab = lab
        self._process = lab.processes.get(host.name)
        self._lost = asyncio.Event()

    async def call(self, request: Request[R], deadline_s: float) -> R:
        self._lab.calls.append((self.host.name, type(request)))
        if (trouble := self._lab.trouble.get((self.host.name, type(request)))) is not None:
            trouble(self)
        if self._process is None or not isinstance(request, TO_AGENTS):
            return cast(R, self._lab.facts.hosts[self.host.name].reply_to(request))
        asked: Request[Any] = request
        answer = asyncio.ensure_future(self._process.call(asked, deadline_s))
        lost = asyncio.ensure_future(self._lost.wait())
        await asyncio.wait((answer, lost), return_when=asyncio.FIRST_COMPLETED)
        lost.cancel()
        if self._lost.is_set():
            raise SessionLost(f"the session to {self.host.name} was lost")
        return cast(R, await answer)

    def lose(self) -> None:
        """The connection breaks; the agent sees the end of its input, and ends when its half has."""
        self._lost.set()
        if self._process is not None:
            self._lab.ends.append(asyncio.ensure_future(self._process.agent.session_lost()))


class Lab:
    """Alpha and beta of a stage, as the coordinator reaches them."""

    def __init__(self, folder: Path) -> None:
        (folder / "hosts").mkdir()
        (folder / "config").mkdir()
        self.stage = Stage(folder / "hosts")
        self.config: Configuration = configuration(folder / "config")
        self.facts = hosts()
        self.processes = {"alpha": self.stage.source, "beta": self.stage.destination}
        self.calls: list[tuple[str, type]] = []
        self.trouble: dict[tuple[str, type], Callable[[Session], None]] = {}
        self.events: list[Event] = []
        self.on_event: Callable[[Event], None] = lambda _: None
        self.ends: list[asyncio.Future[Any]] = []
        self.unreachable: set[str] = set()

    @asynccontextmanager
    async def connect(self, host: Host, sink: EventSink) -> AsyncIterator[Session]:
        if host.name in self.unreachable:
            raise HostUnreachable(host.name)
        if host.name in self.processes and self.calls:
            # A session of a recovery: with an agent of its own.
            machine = self.stage.world.machine(host.name)
            self.processes[host.name] = Process(self.stage.world, machine, self.stage.segment)
        yield Session(self, host)

    def sink(self, event: Event) -> None:
        self.events.append(event)
        self.on_event(event)

    async def migrate(self) -> MigrationResult:
        result = await migrate(self.config, "counter", "beta", dry_run=False, sink=self.sink, connect=self.connect)
        await asyncio.sleep(1.0)  # on the fake clock: what was let go ends
        await asyncio.gather(*self.ends)
        return result


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    return Lab(tmp_path)


def mode(lab: Lab, name: Mode) -> None:
    """Memory moves in a mode of that name."""
    lab.config = replace(lab.config, policy=replace(lab.config.policy, mode=name))


def recorded(tmp_path: Path) -> Phase:
    """Where the coordinator's own journal says that it ended."""
    (path,) = (tmp_path / "xdg").rglob("coordinator.jsonl")
    return read_state(path).phase


def test_moved(lab: Lab, tmp_path: Path) -> None:
    result = run(lab.migrate())
    assert (result.outcome, result.exit_code, result.error) == ("moved", ExitCode.MOVED, None)
    assert verdict_of_lab(lab) == "moved"
    assert recorded(tmp_path) is Phase.RELEASED


def verdict_of_lab(lab: Lab) -> str:
    """As `verdict`; frames are real ones here."""
    world = lab.stage.world
    world.destination.port.sent.append(b"at beta")
    world.source.port.sent.append(b"at alpha")
    return verdict(lab.stage)


@pytest.mark.parametrize("role", ["source", "destination"])
@pytest.mark.parametrize("times", [1, 2])
def test_interrupted_at_every_await_of_a_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, times: int
) -> None:
    found = set()
    for step in range(1, 140, 4):
        folder = tmp_path / str(step)
        folder.mkdir()
        monkeypatch.setenv("XDG_STATE_HOME", str(folder / "xdg"))
        lab = Lab(folder)

        async def story(lab: Lab = lab, step: int = step) -> str:
            work = asyncio.ensure_future(lab.migrate())
            life = getattr(lab.stage, role).life

            def stop() -> None:
                for _ in range(times):
                    work.cancel()

            life.stop_at, life.stop = step, stop
            try:
                return (await work).outcome
            except Interrupted:
                return "untouched"

        outcome = run(story())
        expected = {"moved": "moved", "interrupted": "rolled_back", "untouched": "rolled_back"}
        assert verdict_of_lab(lab) == expected[outcome], step
        assert recorded(folder) in (Phase.RELEASED, Phase.ROLLED_BACK)
        found.add(outcome)
    assert found >= {"moved", "interrupted", "untouched"} - ({"untouched"} if role == "source" else set())


@pytest.mark.parametrize("host", ["alpha", "beta"])
@pytest.mark.parametrize("phase", ["COPYING", "DIVERTED", "FROZEN", "DUMPED", "STAGED", "COMMITTED", "RESUMED"])
def test_a_session_that_is_lost_changes_nothing(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, host: str, phase: str
) -> None:
    """The halves go on by themselves, and the recovery over a new session says how it ended."""
    sessions: dict[str, Session] = {}
    lab.trouble = {(name, RunHalf): lambda s: sessions.update({s.host.name: s}) for name in ("alpha", "beta")}

    when_first_entered(monkeypatch, host, phase, lambda: sessions.pop(host).lose())
    result = run(lab.migrate())
    assert result.outcome == "moved"
    assert verdict_of_lab(lab) == "moved"
    assert (host, Recover) in lab.calls


@pytest.mark.parametrize("host", ["alpha", "beta"])
def test_a_half_that_cannot_be_prepared_refuses_and_undoes_the_other(lab: Lab, tmp_path: Path, host: str) -> None:
    lab.processes[host].life.fail_at = 2
    result = run(lab.migrate())
    assert result.outcome == "refused"
    assert verdict_of_lab(lab) == "rolled_back"
    assert recorded(tmp_path) is Phase.ROLLED_BACK
    assert ("beta", Abort) in lab.calls or host == "beta"


def test_a_host_that_stays_away_leaves_it_in_doubt_and_recover_finishes(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the commit point and the word that the tasks run; without memory that is still to come."""
    mode(lab, "stop-copy")
    dies_at(monkeypatch, lab, "COMMITTED")

    async def story() -> str:
        result = await lab.migrate()
        assert result.outcome == "in_doubt"
        assert result.exit_code is ExitCode.IN_DOUBT
        lab.unreachable.clear()
        recovered = await recover(lab.config, result.id, lab.sink, lab.connect)
        assert recovered.exit_code is ExitCode.MOVED
        again = await recover(lab.config, result.id, lab.sink, lab.connect)
        assert again.outcome == recovered.outcome
        await asyncio.sleep(1.0)
        return recovered.outcome

    assert run(story()) == verdict_of_lab(lab)


def when_first_entered(monkeypatch: pytest.MonkeyPatch, host: str, phase: str, act: Callable[[], None]) -> None:
    """Do something when the half on a host enters a phase, which others may be told of later; once."""
    enter, acts = Half.enter, [act]

    def watched(half: Half, entered: Phase, **how: Any) -> None:
        enter(half, entered, **how)
        if (half.host, entered.value) == (host, phase) and acts:
            acts.pop()()

    monkeypatch.setattr(Half, "enter", watched)


def dies_at(monkeypatch: pytest.MonkeyPatch, lab: Lab, phase: str) -> None:
    """Beta's agent is killed, and beta cannot be reached, when its half enters a phase."""

    def die() -> None:
        lab.unreachable.add("beta")
        lab.stage.destination.life.kill()

    when_first_entered(monkeypatch, "beta", phase, die)


@pytest.mark.parametrize("phase", ["COMMITTED", "RESUMED"])
def test_a_service_that_has_lost_its_memory_is_told_and_never_called_moved(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """Post-copy: the destination's agent ends before all memory is in the tasks, and the guard has killed them."""
    mode(lab, "post-copy")
    dies_at(monkeypatch, lab, phase)

    async def story() -> None:
        first = await lab.migrate()
        assert first.outcome == ("in_doubt" if phase == "COMMITTED" else "moved")  # the source has heard that it runs
        assert first.exit_code in (ExitCode.IN_DOUBT, ExitCode.CLEANUP_INCOMPLETE)
        lab.unreachable.clear()
        for _ in range(2):
            recovered = await recover(lab.config, first.id, lab.sink, lab.connect)
            assert (recovered.outcome, recovered.exit_code) == ("in_doubt", ExitCode.IN_DOUBT)
            assert recovered.error is not None
            assert recovered.error["code"] == "MEMORY_LOST"

    run(story())
    assert lab.stage.world.killed
    assert lab.stage.world.broken == []


@pytest.mark.parametrize("phase", ["COMMITTED", "RESUMED"])
def test_a_service_whose_memory_has_all_arrived_outlives_the_agent(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """Pre-copy: the destination's agent ends before all memory is in the tasks, and the filler goes on without it."""
    mode(lab, "pre-copy")
    dies_at(monkeypatch, lab, phase)

    async def story() -> None:
        first = await lab.migrate()
        lab.unreachable.clear()
        recovered = await recover(lab.config, first.id, lab.sink, lab.connect)
        assert (recovered.outcome, recovered.exit_code) == ("moved", ExitCode.MOVED)

    run(story())
    assert not lab.stage.world.killed
    assert lab.stage.world.broken == []


def test_a_host_that_does_not_answer_an_abort_keeps_the_other_from_nothing(lab: Lab) -> None:
    def fails(_: Session) -> None:
        raise DeadlineExceeded("no answer")

    lab.processes["alpha"].life.fail_at = 2
    lab.trouble["alpha", Abort] = fails
    assert run(lab.migrate()).outcome == "refused"
    assert ("beta", Abort) in lab.calls
    assert verdict_of_lab(lab) == "rolled_back"


def test_recover_of_what_nobody_knows(lab: Lab) -> None:
    with pytest.raises(UnknownMigration, match="no host knows"):
        run(recover(lab.config, "m-0", lab.sink, lab.connect))
    lab.unreachable.add("gamma")
    with pytest.raises(UnknownMigration, match="not reachable: gamma"):
        run(recover(lab.config, "m-0", lab.sink, lab.connect))


def test_a_dry_run_changes_nothing(lab: Lab) -> None:
    result = run(migrate(lab.config, "counter", "beta", dry_run=True, sink=lab.sink, connect=lab.connect))
    assert result.error is None
    assert phase_of(lab.stage.world.source) is phase_of(lab.stage.world.destination) is None
    assert not {kind for _, kind in lab.calls} & {PrepareDestination, PrepareSource, RunHalf}
    assert ("alpha", DescribeWorkload) in lab.calls
