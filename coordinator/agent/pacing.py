"""The pace of this agent over time: in the background it gives way to everybody, as far as it comes on at all.

The least weight there is keeps clients from waiting for us: on two processors that a service, its clients and both
agents share, the p99 while 512 MB are copied is 0.4 ms with it, and 0.6 ms with the next one here. But on a host that
never idles it is a hundredth of a processor, and a service may write faster than that can copy. So the kernel's own
account of how long we have waited for a processor is looked at (Documentation/scheduler/sched-stats.rst).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from coordinator.agent import priority
from coordinator.agent.priority import Pace

#: How often to look, in seconds.
LOOK_S = 0.25
#: Who has waited most of the time, and three times as long as he ran, is starved, until he runs as long as he waits.
_STARVED, _MOST = 3, 0.5

#: How long this process has run, and waited to run, in nanoseconds; ``None`` where the kernel keeps no account.
Times = tuple[int, int]


def starves(before: Times, now: Times, was_starved: bool, span_s: float = LOOK_S) -> bool:
    """Whether a process gets too little of the processors (pure)."""
    ran, waited = now[0] - before[0], now[1] - before[1]
    if was_starved:
        return waited > ran
    return waited > _STARVED * ran and waited > _MOST * span_s * 1e9


def times() -> Times | None:
    """Of the thread that does most of an agent's work."""
    try:
        ran, waited, _ = Path("/proc/self/schedstat").read_text().split()
    except (OSError, ValueError):
        return None
    return int(ran), int(waited)


class Pacer:
    """Sets this process's pace. To be used where an event loop runs."""

    def __init__(
        self,
        look: Callable[[], Times | None] = times,
        set_pace: Callable[[Pace], None] = priority.set_pace,
        press_on: Callable[[bool], None] = priority.press_on,
    ) -> None:
        self._look = look
        self._set_pace = set_pace
        self._press_on = press_on
        self._watch: asyncio.Future[None] | None = None

    def __call__(self, pace: Pace) -> None:
        """See ``priority.set_pace``."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._set_pace(pace)
        if pace == "background":
            self._watch = asyncio.ensure_future(self._keep_coming_on())

    async def _keep_coming_on(self) -> None:
        before, starved = self._look(), False
        while before is not None:
            await asyncio.sleep(LOOK_S)
            now = self._look()
            if now is None:
                return
            if starves(before, now, starved) != starved:
                starved = not starved
                self._press_on(starved)
            before = now
