"""What is pushed to a host: the same every time, no more than is needed, and an agent that runs from it alone."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator import bundle
from coordinator.bundle import BOOTSTRAP, Bundle, agent_bundle
from coordinator.protocol import VERSION

SYSTEM_PYTHON = "/usr/bin/python3"
PYTHONS = [sys.executable, *([SYSTEM_PYTHON] if Path(SYSTEM_PYTHON).exists() else [])]


def is_old(python: str) -> bool:
    """Whether it is older than an agent needs."""
    return (
        subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], check=False).returncode != 0
    )


def test_it_is_reproducible() -> None:
    first = agent_bundle()
    agent_bundle.cache_clear()
    assert agent_bundle() == first
    assert len(first.digest) == 64


def test_it_has_what_an_agent_needs_and_nothing_else() -> None:
    with tarfile.open(fileobj=io.BytesIO(agent_bundle().tar)) as tar:
        entries = tar.getmembers()
    names = {entry.name for entry in entries}
    assert all(entry.isfile() and entry.mode == 0o644 and not entry.mtime and not entry.uid for entry in entries)
    assert all(name.endswith(".py") for name in names)
    top = {name for name in names if name.count("/") == 1 and not name.startswith(("pyroute2/", "netfix/"))}
    assert top == {
        f"coordinator/{name}.py" for name in ("__init__", "errors", "events", "facts", "journal", "protocol", "wire")
    }
    assert {name.split("/")[0] for name in names} == {"coordinator", "netfix", "pyroute2"}
    assert {"coordinator/agent/server.py", "netfix/gate.py", "pyroute2/netlink/rtnl/rtmsg.py"} <= names
    assert next(entry for entry in entries if entry.name == "pyroute2/__init__.py").size == 0
    assert not [name for name in names if "fakes" in name or "test" in name.split("/")]
    assert not names & {"netfix/announce.py", "netfix/cli.py"}


def bootstrap(
    python: str, pushed: Bundle, cache: Path, archive: bytes = b"", call: bytes = b""
) -> tuple[list[str], int]:
    """Start an agent as `ssh` does, which calls it after its hello: its lines, and its exit status."""
    argv = [python, "-I", "-S", "-c", BOOTSTRAP, pushed.digest, str(cache)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(archive)
        process.stdin.flush()
        lines = [process.stdout.readline(), process.stdout.readline()]
        rest, _ = process.communicate(call, timeout=60)
    return [line.decode() for line in [*(line.rstrip() for line in lines), *rest.splitlines()]], process.returncode


def length_and(archive: bytes) -> bytes:
    return b"%d\n" % len(archive) + archive


@pytest.mark.parametrize("python", PYTHONS)
def test_an_agent_starts_from_the_bundle_alone_and_answers(tmp_path: Path, python: str) -> None:
    if is_old(python):
        pytest.skip(f"{python} is too old for an agent")
    pushed = agent_bundle()
    call = b'{"id":1,"call":"Dance","params":{}}\n'
    lines, status = bootstrap(python, pushed, tmp_path / "cache", length_and(pushed.compressed()), call)
    assert (lines[0], json.loads(lines[1]), status) == ("need", {"hello": VERSION}, 0)
    assert json.loads(lines[2])["error"]["code"] == "PROTOCOL"
    lines, status = bootstrap(python, pushed, tmp_path / "cache", b"", call)
    assert (lines[0], json.loads(lines[1]), status) == ("have", {"hello": VERSION}, 0)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [pushed.digest]


DAMAGES: dict[str, Callable[[Bundle], bytes]] = {
    "another checksum": lambda pushed: pushed.compressed()[:-1] + b"?",
    "another byte": lambda pushed: pushed.compressed()[:1000] + b"?" + pushed.compressed()[1001:],
    "cut off": lambda pushed: pushed.compressed()[:-1000],
    "not compressed": lambda pushed: pushed.tar,
    "other code": lambda pushed: gzip.compress(pushed.tar[:-1] + b"?"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_archive_that_arrives_damaged_is_refused(tmp_path: Path, damage: str) -> None:
    pushed = agent_bundle()
    damaged = DAMAGES[damage](pushed)
    lines, status = bootstrap(sys.executable, pushed, tmp_path / "cache", length_and(damaged))
    assert (lines, status) == (["need", "unfit the archive arrived damaged"], 1)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    pushed = agent_bundle()
    lines, status = bootstrap(sys.executable, pushed, tmp_path / "cache", length_and(pushed.compressed()))
    assert lines[1].startswith(f"unfit cannot write to {tmp_path}/cache")
    assert status == 1


def test_the_oldest_agents_are_removed(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number:064d}").mkdir()
    (tmp_path / "something-else").mkdir()
    pushed = agent_bundle()
    bootstrap(sys.executable, pushed, tmp_path, length_and(pushed.compressed()))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 4
    assert {pushed.digest, "something-else"} <= set(left)


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        bundle._package("no_such_package")
