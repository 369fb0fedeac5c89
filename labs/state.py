"""Where a lab keeps what it is: its state directory, the lock over all labs, and the record of what runs."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from labs.commands import LabError

LABS = Path("/run/livemove-lab")
LOCK_ATTEMPTS = 100


@dataclass(frozen=True)
class Paths:
    """Every file of one lab."""

    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,19}", self.name):
            raise LabError(
                f"lab name {self.name!r}: write 1 to 20 of a-z, 0-9 and '-', beginning with a letter"
                " (--name or LIVEMOVE_LAB)"
            )

    @property
    def directory(self) -> Path:
        return LABS / self.name

    @property
    def config(self) -> Path:
        return self.directory / "lab.toml"

    @property
    def record(self) -> Path:
        return self.directory / "state.json"

    @property
    def operator_key(self) -> Path:
        return self.directory / "operator_key"

    @property
    def known_hosts(self) -> Path:
        return self.directory / "known_hosts"

    def netns(self, machine: str) -> Path:
        return self.directory / "netns" / machine

    @property
    def shared(self) -> Path:
        """Storage that every host has at the same place (`boot.SHARED`)."""
        return self.directory / "shared"

    def scratch(self, host: str) -> Path:
        """Mount point, in the host's own mount namespace, of what the host writes."""
        return self.directory / "hosts" / host

    def seed(self, host: str) -> Path:
        """Files put on the host before it starts."""
        return self.directory / "seed" / host


@dataclass(frozen=True)
class HostRecord:
    """A running host: its init, named so that a reused pid is not taken for it."""

    init_pid: int
    start_time: int

    @property
    def is_alive(self) -> bool:
        return start_time(self.init_pid) == self.start_time


@dataclass(frozen=True)
class Record:
    """What `up` made. Written last: a lab without it is half made."""

    root: str
    packages: str
    hosts: dict[str, HostRecord]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Record | None:
        """The record, or None where there is none that can be read."""
        try:
            raw = json.loads(path.read_text())
            hosts = {name: HostRecord(**host) for name, host in raw["hosts"].items()}
            return cls(raw["root"], raw["packages"], hosts)
        except (OSError, ValueError, KeyError, TypeError):
            return None


def is_bound(path: Path) -> bool:
    """Whether something is mounted on the file, as a namespace is that is kept by its file."""
    try:
        return path.stat().st_dev != path.parent.stat().st_dev
    except FileNotFoundError:
        return False


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if it does not run (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


@contextmanager
def all_labs_locked() -> Iterator[None]:
    """One `up` or `down` at a time. The lock is the directory of all labs, which the last `down` removes."""
    for _ in range(LOCK_ATTEMPTS):
        LABS.mkdir(mode=0o700, exist_ok=True)
        try:
            descriptor = os.open(LABS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Whoever held the lock before may have removed the directory: then this lock is on nothing.
        if LABS.exists() and LABS.stat().st_ino == os.fstat(descriptor).st_ino:
            break
        os.close(descriptor)
    else:
        raise LabError(f"{LABS} comes and goes: other labs go up and down all the time; try again")
    try:
        yield
    finally:
        with suppress(OSError):  # another lab is still in it
            LABS.rmdir()
        os.close(descriptor)


def roots_in_use() -> set[str]:
    """The cached roots that labs stand on."""
    records = (Record.load(path) for path in LABS.glob("*/state.json"))
    return {record.root for record in records if record is not None}
