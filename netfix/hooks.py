"""Netfilter hooks of a network namespace stay while packets are queued there, also those of another migration.

When any hook goes away, as the base chains do with their table, the kernel drops every queued packet of the namespace,
of all queues (net/netfilter/core.c: nf_queue_nf_hook_drop). So who queues packets holds a shared lock, and who removes
a hook an exclusive one. It is a flock(2) on the namespace itself, /proc/thread-self/ns/net: nothing is left behind, it
is one for all processes that see the namespace, and it ends with the process that holds it.

Others who remove hooks (a firewall that restarts) do not ask; then what was queued is lost, and TCP sends it again.
"""

import asyncio
import fcntl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

from .namespace import Home

PATIENCE_S = 10.0
"""How long somebody waits for the others, then goes on without the lock: a freeze is shorter, a rule must not stay."""
_ASK_S = 0.005


class Hooks:
    """The hooks of the network namespace of the thread that makes this."""

    def __init__(self) -> None:
        self._namespace = Home()

    async def keep(self) -> None:
        """They stay until `let_go`; waits for somebody who is removing one, some tens of milliseconds. Idempotent."""
        await self._take(fcntl.LOCK_SH)

    def let_go(self) -> None:
        """They may be removed, as far as we are concerned; idempotent."""
        fcntl.flock(self._namespace, fcntl.LOCK_UN)

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Nobody keeps them in this block; waits for those who do, `PATIENCE_S` at most."""
        await self._take(fcntl.LOCK_EX)
        try:
            yield
        finally:
            self.let_go()

    def close(self) -> None:
        """Let go for good; idempotent."""
        self._namespace.close()

    async def _take(self, kind: int) -> None:
        end = monotonic() + PATIENCE_S
        while not self._try(kind) and monotonic() < end:  # noqa: ASYNC110 - others are asked, nothing tells us
            await asyncio.sleep(_ASK_S)

    def _try(self, kind: int) -> bool:
        try:
            fcntl.flock(self._namespace, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
