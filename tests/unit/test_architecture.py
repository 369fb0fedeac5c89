"""The rules that keep the house in order: who may import what, who may do what, and how long things may be."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("coordinator", "netfix")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LAB_FILES = sorted((ROOT / "labs").rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 400, 60

#: What may be imported where decisions are made: nothing that can read, write, wait or ask.
PURE_STANDARD = frozenset(
    {
        "__future__",
        "collections",
        "dataclasses",
        "datetime",
        "difflib",
        "enum",
        "functools",
        "ipaddress",
        "itertools",
        "math",
        "re",
        "typing",
    }
)
PURE_OURS = frozenset(
    f"coordinator.{name}"
    for name in (
        "checks",
        "config",
        "errors",
        "facts",
        "findings",
        "move_facts",
        "obstacles",
        "plan",
        "preflight",
        "preflight_addresses",
        "preflight_files",
        "preflight_namespace",
        "preflight_runtime",
        "protocol",
        "journal",
    )
)
PURE = (
    "coordinator/plan.py",
    "coordinator/preflight.py",
    "coordinator/preflight_addresses.py",
    "coordinator/preflight_files.py",
    "coordinator/preflight_namespace.py",
    "coordinator/move_facts.py",
    "coordinator/preflight_runtime.py",
    "coordinator/checks.py",
    "coordinator/findings.py",
    "coordinator/obstacles.py",
    "coordinator/agent/memory/convergence.py",
)

AGENT_OURS = frozenset(f"coordinator.{name}" for name in ("protocol", "errors", "events", "facts", "journal", "wire"))
STARTS_A_PROCESS = re.compile(
    r"os\.(fork|forkpty|exec\w+|spawn\w+|posix_spawn\w*|system|popen)|asyncio\.create_subprocess_\w+|pty\.(fork|spawn)"
)


def name_of(path: Path) -> str:
    """`coordinator/agent/__init__.py` → `coordinator.agent`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path, *, module_level_only: bool = False) -> Iterator[str]:
    """The full names of all modules a file imports; `from x import y` gives `x.y` if that is a module of ours."""
    nodes = _module_level(tree(path).body) if module_level_only else ast.walk(tree(path))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = name_of(path).split(".")
                above = above if path.name == "__init__.py" else above[:-1]
                base = ".".join([*above[: len(above) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if _is_module(f"{base}.{alias.name}") else base


def _module_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            guard = ast.unparse(node.test) if isinstance(node, ast.If) else ""
            if "TYPE_CHECKING" not in guard:
                yield from _module_level(node.body)
            yield from _module_level(node.orelse)
        else:
            yield node


def _is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def importers(package: str, files: list[Path]) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in files
        if any(name == package or name.startswith(f"{package}.") for name in imports(path))
    }


def test_there_is_something_to_look_at() -> None:
    assert len(FILES) > 20
    assert {name_of(path) for path in FILES} >= {"coordinator.agent", "netfix.announce"}


def test_netfix_never_imports_coordinator() -> None:
    assert not {path for path in importers("coordinator", FILES) if path.startswith("netfix/")}


def test_nothing_outside_the_agent_imports_the_agent() -> None:
    assert not {path for path in importers("coordinator.agent", FILES) if not path.startswith("coordinator/agent/")}


def test_asyncssh_is_imported_in_one_file() -> None:
    assert importers("asyncssh", FILES) == {"coordinator/ssh.py"}


def test_uvloop_is_imported_at_entry_points_only() -> None:
    assert importers("uvloop", FILES) <= {"coordinator/cli.py", "netfix/cli.py"}


def test_scapy_is_imported_in_one_file() -> None:
    assert importers("scapy", FILES + LAB_FILES) == {"netfix/announce.py"}


@pytest.mark.parametrize("name", PURE)
def test_decisions_do_no_io(name: str) -> None:
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{name} is not there yet")
    found = {each if each.startswith("coordinator.") else each.partition(".")[0] for each in imports(path)}
    assert found <= PURE_STANDARD | PURE_OURS
    calls = {ast.unparse(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)}
    assert not calls & {"open", "print", "input", "eval", "exec", "__import__"}


def test_the_transition_table_does_no_io() -> None:
    parts = {"_FORWARD", "_BEFORE_COMMIT", "TRANSITIONS", "FINISHED", "check_transition", "is_committed"}
    used: set[str] = set()
    for node in tree(ROOT / "coordinator/journal.py").body:
        names = {node.name} if isinstance(node, ast.FunctionDef) else {ast.unparse(each) for each in _targets(node)}
        if names & parts:
            parts -= names
            used |= {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    assert not parts
    assert not used & {"os", "fcntl", "time", "json", "open", "Path"}


def _targets(node: ast.stmt) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []


def test_one_file_starts_processes() -> None:
    starters = importers("subprocess", FILES) | importers("multiprocessing", FILES)
    for path in FILES:
        calls = (ast.unparse(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute))
        if any(STARTS_A_PROCESS.fullmatch(call) for call in calls):
            starters.add(str(path.relative_to(ROOT)))
    assert starters == {"coordinator/agent/process.py"}


def test_the_agent_needs_the_standard_library_and_pyroute2_alone() -> None:
    foreign = set()
    for path in FILES:
        inside = path.is_relative_to(ROOT / "coordinator/agent")
        for name in imports(path) if inside else ():
            allowed = (
                name.partition(".")[0] in {*sys.stdlib_module_names, "pyroute2", "netfix"} - {"asyncssh"}
                or name in AGENT_OURS
                or name == "coordinator"
                or name.startswith("coordinator.agent")
            )
            if not allowed or name == "netfix.announce":
                foreign.add(f"{path.relative_to(ROOT)}: {name}")
    assert not foreign


def test_what_the_agent_needs_needs_nothing_else() -> None:
    """The same for what it imports, however far away."""
    files = {name_of(path): path for path in FILES}
    seen: set[str] = set()
    ahead = [name for name in files if name.startswith("coordinator.agent")]
    while ahead:
        name = ahead.pop()
        if name in seen or name not in files:
            continue
        seen.add(name)
        ahead += list(imports(files[name]))
    foreign = {
        f"{name}: {other}"
        for name in seen
        for other in imports(files[name])
        if other.partition(".")[0] not in {*sys.stdlib_module_names, "pyroute2", *PACKAGES}
    }
    assert not foreign


def test_there_are_no_import_cycles() -> None:
    files = {name_of(path): path for path in FILES}
    graph = {
        name: {other for other in imports(path, module_level_only=True) if other in files and other != name}
        for name, path in files.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize("path", FILES + LAB_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short_and_modules_say_what_they_are(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") < FILE_LINES
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 >= FUNCTION_LINES
    ]
    assert not long
    assert not text.strip() or ast.get_docstring(tree(path))


def project_files() -> list[Path]:
    """What is tracked, and what will be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="this is not a git clone")
def test_no_file_names_a_package_registry_or_a_place_on_a_machine_of_ours() -> None:
    registry = re.compile(
        r"(?:--?(?:extra-)?index-url|https?://[^\s/\"']*(?:pypi|pythonhosted|artifactory|nexus|registry|npmjs)[^\s\"']*)"
    )
    place = re.compile(r"(?<![\w.])/(?:work|home/\w+|root/\w+|Users)/[\w.]")
    found = []
    for path in project_files():
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
            if registry.search(line) or place.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found
