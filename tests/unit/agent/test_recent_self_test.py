"""A self-test that succeeded is believed for a while, on the same system; one that failed is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.agent import recent_self_test as module
from coordinator.agent.recent_self_test import recent_self_test
from coordinator.protocol import SelfTestResult

GOOD = SelfTestResult(ok=True, any_uid=True, dump_ms=3.0, restore_ms=4.0)
BAD = SelfTestResult(ok=False, problem="no")


class Trials:
    """Counts how often it is run."""

    def __init__(self, result: SelfTestResult = GOOD) -> None:
        self.result = result
        self.runs = 0

    async def __call__(self) -> SelfTestResult:
        self.runs += 1
        return self.result


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "self-test.json"


async def test_it_is_run_once(file: Path) -> None:
    test = Trials()
    assert [await recent_self_test(60, file, test) for _ in range(3)] == [GOOD] * 3
    assert test.runs == 1
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


async def test_who_wants_a_new_one_gets_it(file: Path) -> None:
    await recent_self_test(60, file, Trials())
    test = Trials(BAD)
    assert await recent_self_test(0, file, test) == BAD
    assert not file.exists()


async def test_an_old_one_and_one_of_another_system_do_not_count(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = Trials()
    await recent_self_test(60, file, test)
    known = json.loads(file.read_text())
    file.write_text(json.dumps(known | {"at_s": known["at_s"] - 61}))
    await recent_self_test(60, file, test)
    assert test.runs == 2
    monkeypatch.setattr(module, "_system", lambda: ["another"])
    await recent_self_test(60, file, test)
    assert test.runs == 3


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"system": 1, "at_s": "x", "result": {}}'])
async def test_a_damaged_file_is_none(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    assert await recent_self_test(60, file, Trials()) == GOOD


async def test_a_host_that_cannot_remember_tests(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, no folder")
    assert await recent_self_test(60, tmp_path / "cache" / "self-test.json", Trials()) == GOOD
