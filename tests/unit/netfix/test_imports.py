"""What netfix may import: a host has the standard library and pyroute2, nothing else."""

import ast
import sys
from pathlib import Path

import pytest

import netfix

PACKAGE = Path(netfix.__file__).parent
EXTRA = {
    "announce": {"scapy"},
    "cli": {"click", "uvloop"},
    "cli_common": {"click", "rich"},
    "cli_conntrack": {"click"},
    "cli_hold": {"click"},
    "cli_move": {"click"},
    "cli_sweep": {"click"},
}


@pytest.mark.parametrize("module", sorted(str(path.relative_to(PACKAGE))[:-3] for path in PACKAGE.rglob("*.py")))
def test_modules_import_what_a_host_has(module: str) -> None:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            imported.add(node.module.split(".")[0])
    allowed = set(sys.stdlib_module_names) - {"subprocess"} | {"pyroute2"} | EXTRA.get(module, set())
    assert imported <= allowed


def test_the_modules_of_a_host_do_not_import_the_others() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.stem in EXTRA:
            continue
        relative = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        names = {
            name
            for node in relative
            if node.level
            for name in ([node.module] if node.module else [alias.name for alias in node.names])
        }
        assert not names & set(EXTRA)
