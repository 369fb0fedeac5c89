"""The pace of this agent over time: in the background it gives way to everybody, as far as it comes on at all.

The least weight there is keeps clients from waiting for us: on two processors that a service, its clients and both
agents share, the p99 while 512 MB are copied is 0.4 ms with it, and 0.6 ms with the next one here. But on a host that
never idles it is a hundredth of a processor, and a service may write faster than that can copy. So the kernel's own
account of how long we have waited for a processor is looked at (Documentation/scheduler/sched-stats.rst).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from coordinator.agent import priority
from coordinator.agent.priority import Pace
from coordinator.agent.tasks import threads

#: How often to look, in seconds.
LOOK_S = 0.25
#: Who has waited most of the time, and three times as long as he ran, is starved, until he runs as long as he waits.
_STARVED, _MOST = 3, 0.5

#: How long each thread of this process has run, and waited to run, in nanoseconds, by its number. Nothing where the
#: kernel keeps no account.
Times = Mapping[int, tuple[int, int]]


def starves(before: Times, now: Times, was_starved: bool, span_s: float = LOOK_S) -> bool:
    """Whether a process gets too little of the processors (pure)."""
    ran, waited = (
        sum(spent[kind] - before.get(thread, (0, 0))[kind] for thread, spent in now.items()) for kind in (0, 1)
    )
    if was_starved:
        return waited > ran
    return waited > _STARVED * ran and waited > _MOST * span_s * 1e9


def times() -> Times:
    """Of all threads that there are now."""
    found = {}
    for thread in threads(os.getpid()):
        with contextlib.suppress(OSError, ValueError):  # it has ended
            ran, waited, _ = Path(f"/proc/self/task/{thread}/schedstat").read_text().split()
            found[thread] = int(ran), int(waited)
    return found


class Pacer:
    """Sets this process's pace. To be used where an event loop runs."""

    def __init__(
        self,
        look: Callable[[], Times] = times,
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
        while before:
            await asyncio.sleep(LOOK_S)
            now = self._look()
            if starves(before, now, starved) != starved:
                starved = not starved
                self._press_on(starved)
            before = now
