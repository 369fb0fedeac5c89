"""labs/xonotic: what it prints, and that its exit status says whether a player lost anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from click.testing import Result as Done

from labs import limits, xonotic
from labs.catalogue.nexuiz import NEXUIZ, XONOTIC, XONOTIC_SERVER
from labs.clients.players import Seen
from labs.commands import LabError
from labs.game import Hop, Result

Play = Callable[[Result], None]


def saw(name: str, **values: Any) -> dict[str, Any]:
    """What a player tells who saw nothing unusual but for these values."""
    usual = Seen(name, 12.0, 15.0, 180.0, 100.0, snapshots=900, lost=0, backwards=0, refused=0, trouble="")
    return asdict(usual) | values


def well(result: Result) -> None:
    result.hops = [Hop("alpha", "beta", 120.5, 180.0), Hop("beta", "gamma", 130.5, 190.0)]
    result.count([saw("player1"), saw("player2")])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    @contextmanager
    def no_lab(*_: Any, **__: Any) -> Iterator[None]:
        yield

    for name in ("only_one", "lab_for_a_while"):
        monkeypatch.setattr(xonotic, name, no_lab)
    monkeypatch.setattr(limits, "work_around", lambda _: "")
    monkeypatch.delenv("XONOTIC_DIR", raising=False)

    def run_with(play: Play, *arguments: str) -> Done:
        monkeypatch.setattr(xonotic, "play", lambda lab, steps, undo, result, **_: play(result))
        return CliRunner().invoke(xonotic.cli, arguments)

    return run_with


def test_a_game_that_went_well_is_one_object(run: Callable[..., Done]) -> None:
    done = run(well, "--json", "--players", "2")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {
        "engine": "nexuiz",
        "players": 2,
        "dropped": 0,
        "snapshots_lost": 0,
        "hops": [
            {"from": "alpha", "to": "beta", "freeze_ms": 120.5, "longest_silence_ms": 180.0},
            {"from": "beta", "to": "gamma", "freeze_ms": 130.5, "longest_silence_ms": 190.0},
        ],
    }


def test_a_game_that_went_well_is_one_line(run: Callable[..., Done]) -> None:
    done = run(well)
    assert done.stdout == "nexuiz: 8 players, 0 dropped, 0 snapshots lost, longest silence 190 ms in 2 hops\n"


@pytest.mark.parametrize(
    ("seen", "counts"),
    [
        ({"lost": 3}, (0, 3)),
        ({"trouble": "the server ended the connection"}, (1, 0)),
        ({"backwards": 1}, (0, 0)),
        ({"refused": 2}, (0, 0)),
    ],
)
def test_whatever_a_player_loses_is_told(
    run: Callable[..., Done], seen: dict[str, Any], counts: tuple[int, int]
) -> None:
    done = run(lambda result: result.count([saw("player1"), saw("player2", **seen)]), "--json")
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert (told["dropped"], told["snapshots_lost"]) == counts
    assert len(told["problems"]) == 1 and told["problems"][0].startswith("player2: ")


def test_a_lab_that_fails(run: Callable[..., Done]) -> None:
    def never(result: Result) -> None:
        raise LabError("alpha: nexuiz does not listen")

    assert run(never).exit_code == 1


def test_xonotic_is_played_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XONOTIC_DIR", raising=False)
    assert xonotic.chosen() == (NEXUIZ, None)
    monkeypatch.setenv("XONOTIC_DIR", str(tmp_path))
    with pytest.raises(LabError, match="XONOTIC_DIR"):
        xonotic.chosen()
    (tmp_path / XONOTIC_SERVER).touch()
    (tmp_path / "data").mkdir()
    assert xonotic.chosen() == (XONOTIC, tmp_path)
