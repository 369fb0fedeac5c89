"""Deeds: changes to a host, each recorded in the journal together with how it is undone, before it is done.

The same table of undoers serves a half that gives up and a recovery after a crash, so there is one way back only.
Undoers are idempotent: a deed that was recorded and never done is undone just the same.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from coordinator.errors import LivemoveError
from coordinator.journal import Journal

Undoer = Callable[[dict[str, Any]], Awaitable[None]]


class Deeds:
    """The changes one half has made to its host and not undone yet. ``undoers`` has one entry for each name."""

    def __init__(self, journal: Journal, undoers: Mapping[str, Undoer]) -> None:
        self._journal = journal
        self._undoers = undoers

    def record(self, name: str, *, durable: bool = True, **params: Any) -> None:
        """Record a change that the next line makes. Not ``durable``: the record survives our end, not the host's."""
        if name not in self._undoers:
            raise KeyError(name)
        self._journal.deed(name, params, durable=durable)

    def recorded(self, *names: str) -> list[str]:
        """Those of ``names`` that are recorded and not undone yet."""
        return [name for name, _ in self._journal.state.deeds.values() if name in names]

    def params(self, name: str) -> dict[str, Any]:
        """How that change, which is recorded, was made."""
        return next(params for known, params in self._journal.state.deeds.values() if known == name)

    async def undo(self, *, only: Collection[str] | None = None, keep: Collection[str] = ()) -> list[str]:
        """Undo all deeds (or ``only`` those named), newest first; return a warning for each that failed.

        Deeds named in ``keep`` are there to stay: they are crossed out without being undone.

        A failure does not stop the others: what can be put right is put right (I5)."""
        warnings = []
        for number, (name, params) in sorted(self._journal.state.deeds.items(), reverse=True):
            if only is not None and name not in only:
                continue
            if name in keep:
                self._journal.undone(number)
                continue
            try:
                await self._undoers[name](params)
                self._journal.undone(number)
            except (LivemoveError, OSError, TimeoutError) as error:
                warnings.append(f"undoing {name}: {error}")
        return warnings
