"""Typed events: the one source for the log, the progress display and the JSON result.

A half or the coordinator emits them through an ``EventSink``; an agent's events travel to the coordinator as messages.
State changes (``phase``, ``notice``) are never dropped; ``progress`` may be coalesced by a sink.
Times are milliseconds since the migration began on the emitting host, from its monotonic clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

EventName = Literal["phase", "step", "progress", "notice"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened on one host.

    ``phase``: ``name`` is the phase entered. ``step``: a span inside a phase, ``state`` says which end of it.
    ``progress``: ``done`` of ``total`` ``unit``, or of nobody knows how many (0). ``notice``: a warning with a stable
    ``name`` and a ``detail`` to read.
    """

    kind: EventName
    name: str
    host: str
    at_ms: float
    state: Literal["started", "completed", "failed"] = "completed"
    detail: str = ""
    hint: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""

    @property
    def goes_on(self) -> bool:
        """Whether there is more to come, of a ``progress``."""
        return self.done < self.total or not self.total


EventSink = Callable[[Event], None]
#: Is told what is sent, how many bytes, and of how many; 0 if that is not known.
Progress = Callable[[str, int, int], None]
