"""The journal of one migration on one machine: phases, allowed transitions, deeds, and the commit point.

A journal is a directory ``<state>/<migration id>/`` with a file of JSON lines for each role (``source``,
``destination``, ``coordinator``) and a ``lock`` that the live half holds. Records are appended and, where it
matters, fsynced before the next step is taken, so that what a crash leaves behind is always a true prefix.

The record ``COMMITTED`` in the *source's* journal is the commit point of the whole migration. CRIU's hook on the
source reads this very file (see ``agent/criu.py``): invariant I3, "before COMMITTED the source can always resume;
after COMMITTED it never resumes", does not depend on any process of ours being alive.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from coordinator.errors import IllegalTransition, JournalDamaged

Role = Literal["source", "destination", "coordinator"]

DEFAULT_STATE_DIR = Path("/var/lib/livemove")


class Phase(StrEnum):
    """The phases of a migration, in their order. Both halves walk through the same ones."""

    OPENED = "OPENED"
    PREPARED = "PREPARED"
    COPYING = "COPYING"
    DIVERTED = "DIVERTED"
    FROZEN = "FROZEN"
    DUMPED = "DUMPED"
    STAGED = "STAGED"
    COMMITTED = "COMMITTED"
    RESUMED = "RESUMED"
    RELEASED = "RELEASED"
    ABORTED = "ABORTED"
    ROLLED_BACK = "ROLLED_BACK"


_FORWARD = [phase for phase in Phase if phase not in (Phase.ABORTED, Phase.ROLLED_BACK)]
_BEFORE_COMMIT = _FORWARD[: _FORWARD.index(Phase.COMMITTED)]

#: From each phase, where one may go: one step forward, or, before COMMITTED, to ABORTED. ABORTED is the decision,
#: ROLLED_BACK says that everything is undone. Nothing leads from COMMITTED back: that is I3.
TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    **{
        here: frozenset({there, Phase.ABORTED} if here in _BEFORE_COMMIT else {there})
        for here, there in itertools.pairwise(_FORWARD)
    },
    Phase.RELEASED: frozenset(),
    Phase.ABORTED: frozenset({Phase.ROLLED_BACK}),
    Phase.ROLLED_BACK: frozenset(),
}

FINISHED = frozenset({Phase.RELEASED, Phase.ROLLED_BACK})


def check_transition(here: Phase, there: Phase) -> None:
    """Raise ``IllegalTransition`` unless ``there`` may follow ``here``."""
    if there not in TRANSITIONS[here]:
        raise IllegalTransition(f"a migration in phase {here} cannot enter {there}")


def is_committed(phase: Phase) -> bool:
    """Whether the commit point lies behind: from here on only the destination may run the workload."""
    return phase in (Phase.COMMITTED, Phase.RESUMED, Phase.RELEASED)


@dataclass(slots=True)
class JournalState:
    """What a journal's records add up to."""

    migration: str
    role: Role
    plan: dict[str, Any]
    opened_at: float
    phase: Phase = Phase.OPENED
    deeds: dict[int, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Journal:
    """An open journal of one role. ``enter`` and ``deed`` return only when the record is where it has to be."""

    def __init__(self, path: Path, state: JournalState, descriptor: int) -> None:
        self.path = path
        self.state = state
        self._descriptor = descriptor
        self._next_deed = max(state.deeds, default=-1) + 1

    @classmethod
    def create(cls, state_dir: Path, migration: str, role: Role, plan: dict[str, Any]) -> Journal:
        """Start a journal; ``FileExistsError`` if this migration has one of that role already."""
        folder = state_dir / migration
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"{role}.jsonl"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        journal = cls(path, JournalState(migration, role, plan, time.time()), descriptor)
        try:
            journal._append("open", durable=True, migration=migration, role=role, plan=plan)
        except OSError:
            path.unlink()
            journal.close()
            raise
        _sync_folder(folder)
        _sync_folder(state_dir)
        return journal

    @classmethod
    def load(cls, path: Path) -> Journal:
        """Open an existing journal for reading its state and for going on with it."""
        state = read_state(path)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        # A torn last line never happened: cut off, it cannot spoil the record that follows.
        os.ftruncate(descriptor, path.read_bytes().rfind(b"\n") + 1)
        return cls(path, state, descriptor)

    @property
    def phase(self) -> Phase:
        """The phase entered last."""
        return self.state.phase

    def enter(self, phase: Phase, *, durable: bool = True, reason: str = "") -> None:
        """Check the transition and record it; with ``durable`` the record is on disk when this returns."""
        check_transition(self.state.phase, phase)
        self._append("phase", durable=durable, phase=phase.value, reason=reason)
        self.state.phase = phase
        if reason:
            self.state.notes.append(reason)

    def observe(self, phase: Phase, note: str = "") -> None:
        """Record a phase that somebody else has entered: the coordinator's journal may miss some of them."""
        self._append("phase", durable=False, phase=phase.value, reason=note)
        self.state.phase = phase

    def deed(self, name: str, params: dict[str, Any], *, durable: bool = True) -> int:
        """Record, *before* it is done, a change to the host that has to be undone one day."""
        number, self._next_deed = self._next_deed, self._next_deed + 1
        self._append("deed", durable=durable, number=number, name=name, params=params)
        self.state.deeds[number] = (name, params)
        return number

    def undone(self, number: int) -> None:
        """Record that the change of that number is undone, or needs no undoing any more."""
        self._append("undone", durable=False, number=number)
        self.state.deeds.pop(number, None)

    def freeze_parts(self, parts: Sequence[tuple[str, float]]) -> None:
        """Record, when it is over, where a freeze has gone: each part with its milliseconds, in their order."""
        self._append("freeze", durable=False, parts=[{"name": name, "ms": round(ms, 3)} for name, ms in parts])

    def close(self) -> None:
        """Close the file; records stay."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, kind: str, *, durable: bool, **data: Any) -> None:
        """Append a record, wholly or not at all: one that could not be written, or synced where it has to be, must not
        be read by anybody later as if it had happened (I3 for COMMITTED, which CRIU's hook reads from this file)."""
        record = {"at": round(time.time(), 6), "kind": kind, **data}
        line = (json.dumps(record, separators=(",", ":")) + "\n").encode()
        before = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            if durable:
                os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, before)
            raise


def read_state(path: Path) -> JournalState:
    """Add up the records of a journal. A torn last line is a record that never happened; any other damage raises."""
    state: JournalState | None = None
    for record in _records(path):
        kind = record.get("kind")
        if kind == "open":
            state = JournalState(record["migration"], record["role"], record["plan"], record["at"])
        elif state is None:
            raise JournalDamaged(f"{path}: the first record is {kind!r}, not 'open'")
        elif kind == "phase":
            state.phase = Phase(record["phase"])
            if record.get("reason"):
                state.notes.append(record["reason"])
        elif kind == "deed":
            state.deeds[record["number"]] = (record["name"], record["params"])
        elif kind == "undone":
            state.deeds.pop(record["number"], None)
    if state is None:
        raise JournalDamaged(f"{path}: no record in it", "The migration had not begun: the file can be removed.")
    return state


def _records(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise JournalDamaged(f"{path}:{number}: not a record: {error}") from error
        if not isinstance(record, dict):
            raise JournalDamaged(f"{path}:{number}: not a record: {line[:60]!r}")
        yield record


def journals(state_dir: Path) -> list[Path]:
    """All journals below ``state_dir``, oldest migration first. One without a record is of a migration that never
    began: its host crashed before the first record was on disk, and so before anything was changed."""
    begun = [path for path in state_dir.glob("*/*.jsonl") if has_begun(path)]
    return sorted(begun, key=lambda path: path.stat().st_mtime)


def has_begun(path: Path) -> bool:
    """Whether a journal has at least one whole record."""
    return b"\n" in path.read_bytes()


class LiveLock:
    """The lock that a live half holds. The kernel releases it when the process ends, however it ends."""

    def __init__(self, folder: Path, role: Role) -> None:
        self._path = folder / f"{role}.lock"
        self._descriptor = -1

    def take(self) -> bool:
        """Try to become the live half; ``False`` if another process is."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Stop being the live half. The file goes too: after the end only the journal is left (I5)."""
        if self._descriptor >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
