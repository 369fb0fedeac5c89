"""The agent's request loop: what it answers, and what becomes of a half when calls and sessions end."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.agent.fakes.clock import run
from coordinator.errors import AgentFailed, Interrupted, LivemoveError, NotEnoughSpace, WorkloadBusy
from coordinator.journal import Journal, Phase
from coordinator.protocol import Abort, HalfResult, ListMigrations, PrepareDestination, PrepareSource, Recover, RunHalf
from coordinator.wire import encode
from tests.unit.agent.stage import ID, Process, Stage, credentials, phase_of, verdict


async def answer(process: Process, line: bytes) -> dict[str, Any]:
    await process.agent.handle(line)
    return process.lines[-1]


def prepare(stage: Stage) -> PrepareDestination:
    return PrepareDestination(plan=stage.plan, credentials=credentials()[1])


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (b'{"id":7,"call":"Dance","params":{}}', "PROTOCOL", "no call 'Dance'"),
        (b'{"id":7,"call":"Abort","params":{"reason":5}}', "PROTOCOL", "Abort.reason"),
        (b'{"id":7,"call":"Abort","params":{"reason":"x","when":"now"}}', "PROTOCOL", "when"),
        (b'{"id":7,"call":"Abort","params":[]}', "PROTOCOL", "Abort"),
        (b'{"id":7,"call":"RunHalf","params":{}}', "PROTOCOL", "no prepared half"),
        (b'{"id":7,"call":"Recover","params":{"id":"m","verdict":"unknown","wait_s":0}}', "UNKNOWN_MIGRATION", "m"),
        (b'{"id":7}', "AGENT_FAILED", "KeyError"),
    ],
)
def test_a_bad_call_is_answered_with_an_error_that_keeps_its_type(
    tmp_path: Path, line: bytes, code: str, words: str
) -> None:
    told = run(answer(Stage(tmp_path).source, line))
    assert told["id"] == 7
    assert told["error"]["code"] == code
    assert words in told["error"]["message"]


def test_a_line_that_is_no_json_is_answered_too(tmp_path: Path) -> None:
    told = run(answer(Stage(tmp_path).source, b"hello\n"))
    assert (told["id"], told["error"]["code"]) == (None, "AGENT_FAILED")


def test_a_good_call(tmp_path: Path) -> None:
    told = run(answer(Stage(tmp_path).source, b'{"id":1,"call":"ListMigrations","params":{}}'))
    assert told == {"id": 1, "reply": {"records": []}}


def test_events_and_records_of_a_prepared_half(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        await stage.destination.call(prepare(stage))
        assert stage.destination.lines[0]["event"]["name"] == "PREPARED"
        (record,) = (await stage.destination.call(ListMigrations())).records
        assert (record.id, record.role, record.phase, record.live) == (ID, "destination", Phase.PREPARED, True)

    run(story(Stage(tmp_path)))


def test_a_session_that_is_lost_undoes_a_prepared_half(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        await stage.destination.call(prepare(stage))
        assert stage.world.destination.remains
        await stage.destination.agent.session_lost()
        await stage.destination.agent.session_lost()

    stage = Stage(tmp_path)
    run(story(stage))
    assert verdict(stage) == "rolled_back"
    assert phase_of(stage.world.destination) is Phase.ROLLED_BACK


def test_a_session_that_is_lost_leaves_a_half_that_runs_alone(tmp_path: Path) -> None:
    """Also one whose call has passed its deadline: nothing of it is undone beside its back."""

    async def story(stage: Stage) -> None:
        for_source, for_destination = credentials()
        ready = await stage.destination.call(PrepareDestination(plan=stage.plan, credentials=for_destination))
        await stage.source.call(PrepareSource(plan=stage.plan, credentials=for_source, port=ready.port))
        for process in (stage.source, stage.destination):
            with pytest.raises(AgentFailed, match="deadline"):
                await process.call(RunHalf(), 0)
        await asyncio.gather(stage.source.agent.session_lost(), stage.destination.agent.session_lost())

    stage = Stage(tmp_path)
    run(story(stage))
    assert verdict(stage) == "moved"


def test_an_agent_has_one_half(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        await stage.destination.call(prepare(stage))
        with pytest.raises(WorkloadBusy, match="owns a half"):
            await stage.destination.call(prepare(stage))
        await stage.destination.call(Abort(reason="enough"))

    stage = Stage(tmp_path)
    run(story(stage))
    assert verdict(stage) == "rolled_back"


def test_a_workload_is_moved_once_at_a_time(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        earlier = replace(stage.plan, id="earlier")
        Journal.create(stage.world.destination.state, "earlier", "destination", encode(earlier)).close()
        with pytest.raises(WorkloadBusy, match="is being moved by earlier"):
            await stage.destination.call(prepare(stage))
        await stage.destination.call(Abort(reason="refused"))

    stage = Stage(tmp_path)
    run(story(stage))
    assert stage.world.destination.remains == []
    assert stage.world.destination.gates == {}


def test_what_fails_while_preparing_keeps_its_type_and_is_undone(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        stage.destination.life.fail_at = 3
        with pytest.raises(NotEnoughSpace):
            await stage.destination.call(prepare(stage))

    stage = Stage(tmp_path)
    run(story(stage))
    assert verdict(stage) == "rolled_back"


@pytest.mark.parametrize("step", range(1, 10))
def test_an_abort_that_comes_while_preparing_undoes_all_of_it(tmp_path: Path, step: int) -> None:
    async def story(stage: Stage) -> None:
        process = stage.destination
        aborts: list[asyncio.Task[Any]] = []

        def abort() -> None:
            line = {"id": "abort", "call": "Abort", "params": {"reason": "changed my mind"}}
            aborts.append(asyncio.ensure_future(process.agent.handle(json.dumps(line).encode())))

        process.life.stop_at, process.life.stop = step, abort
        try:
            await process.call(prepare(stage))
        except LivemoveError as error:
            assert isinstance(error, Interrupted)
            assert error.message == "changed my mind"
        await asyncio.gather(*aborts)
        if not aborts:
            await process.call(Abort(reason="too early to be seen"))

    stage = Stage(tmp_path)
    run(story(stage))
    assert verdict(stage) == "rolled_back"


def test_a_deadline_passes_while_preparing(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        with pytest.raises(AgentFailed, match="deadline"):
            await stage.destination.call(prepare(stage), 0)

    stage = Stage(tmp_path)
    run(story(stage))
    assert verdict(stage) == "rolled_back"


def test_a_recovery_waits_for_a_live_half_and_not_for_ever(tmp_path: Path) -> None:
    async def story(stage: Stage) -> None:
        await stage.destination.call(prepare(stage))
        async with stage.connect(stage.destination.host, lambda _: None) as session:
            with pytest.raises(WorkloadBusy, match="under way"):
                await session.call(Recover(id=ID, verdict="aborted", wait_s=5))
            ending = asyncio.ensure_future(stage.destination.agent.session_lost())
            told = await session.call(Recover(id=ID, verdict="aborted", wait_s=5))
            await ending
            assert isinstance(told, HalfResult)
            assert (told.outcome, told.phase) == ("rolled_back", Phase.ROLLED_BACK)

    stage = Stage(tmp_path)
    run(story(stage))
    assert verdict(stage) == "rolled_back"
