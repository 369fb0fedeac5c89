"""The pages made from the code are what is on disk, and they lack nothing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from coordinator.agent.obstacles import _SOCKET_CODES
from coordinator.checks import CHECKS
from coordinator.errors import EXIT_MEANINGS, ExitCode, LivemoveError
from coordinator.obstacles import OBSTACLES
from coordinator.report.docs import PAGES, write

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", PAGES)
def test_the_page_on_disk_is_the_one_the_code_makes(name: str) -> None:
    said = "run: python -m coordinator.report.docs"
    assert (ROOT / "docs" / name).read_text() == PAGES[name](), said


def test_the_pages_are_written_where_they_are_asked_for(tmp_path: Path) -> None:
    write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(PAGES)


def test_every_code_is_in_the_pages() -> None:
    errors, checks = PAGES["errors.md"](), PAGES["checks.md"]()
    assert all(f"| `{code}` |" in errors for code in LivemoveError.registry)
    assert all(f"| `{code}` |" in checks for code in (*CHECKS, *OBSTACLES))
    assert set(EXIT_MEANINGS) == set(ExitCode)


def test_every_error_has_a_meaning_and_a_hint_of_one_line() -> None:
    for kind in LivemoveError.registry.values():
        assert kind.__doc__, kind
        assert kind.default_hint, kind
        assert "\n" not in kind.default_hint, kind


def test_every_obstacle_an_agent_makes_is_in_the_registry() -> None:
    made = set()
    for path in (ROOT / "coordinator/agent").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Obstacle":
                made |= {
                    word.value.value
                    for word in node.keywords
                    if word.arg == "code" and isinstance(word.value, ast.Constant)
                }
    assert made | set(_SOCKET_CODES.values()) == set(OBSTACLES)
