"""An event loop with a clock of its own: when nothing is ready, time jumps to the next timer. Nothing ever waits.

Deadlines, repeats and pauses take place in their order and at no cost, the same in every run. Only for what lives in
memory: a process or a socket is not waited for, and what is given to a thread is done by the loop itself, a turn later.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

R = TypeVar("R")


class Deadlock(Exception):
    """Every task waits, and no timer is set that could wake one."""


class _NeverWaiting(selectors.DefaultSelector):
    """Looks once, and lets the loop's clock jump where it was to wait."""

    passed_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """See ``selectors``."""
        ready = super().select(0)
        if not ready and timeout is None:
            raise Deadlock("every task waits, and no timer is set")
        if not ready and timeout is not None and timeout > 0:
            self.passed_s += timeout
        return ready


class FakeClock(asyncio.SelectorEventLoop):
    """See the module. ``time`` begins at 0 and is the clock of everything that runs in it."""

    def __init__(self) -> None:
        self._waits = _NeverWaiting()
        super().__init__(self._waits)

    def run_in_executor(self, executor: Any, func: Callable[..., R], *args: Any) -> asyncio.Future[R]:  # type: ignore[override]
        """No thread: it is done at the next turn, also if nobody waits for it any more, as in a thread."""
        done: asyncio.Future[R] = self.create_future()

        def work() -> None:
            try:
                result = func(*args)
            except BaseException as error:
                if not done.done():
                    done.set_exception(error)
            else:
                if not done.done():
                    done.set_result(result)

        self.call_soon(work)
        return done

    def time(self) -> float:
        """Seconds since this loop was made, as far as it believes."""
        return self._waits.passed_s


def run(work: Coroutine[Any, Any, R]) -> R:
    """Run to the end in a fresh loop; tasks that are left then are cancelled, as ``asyncio.run`` does."""
    with asyncio.Runner(loop_factory=FakeClock) as runner:
        return runner.run(work)
