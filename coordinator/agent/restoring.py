"""The restore of a destination half, and its memory: filled into the tasks behind the freeze, and what becomes of it in
doubt.

Pages are in this process until they are in the tasks, or, with a fetcher, still on the source. So an agent that ends in
doubt stays for as long as the tasks may need it, and a recovery waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import cached_property
from typing import Any

from coordinator.agent.criu import Restore
from coordinator.agent.files.base import FilesTarget
from coordinator.agent.half import Half, as_livemove_error
from coordinator.agent.memory.fetching import PageFetcher
from coordinator.agent.memory.filling import FillingMemory
from coordinator.agent.messages import FilledIn
from coordinator.errors import (
    AgentFailed,
    ChannelFailed,
    FilesNotCopied,
    InDoubt,
    LivemoveError,
    MemoryLost,
    RestoreFailed,
)


class RestoringHalf(Half):
    """What a destination half knows of CRIU's restore, of memory, and of files, which are all there before the tasks
    run. A recovery has no memory, but may find another agent's guard."""

    _restore: Restore | None = None
    _memory: FillingMemory | None = None
    _fetcher: PageFetcher | None = None

    @cached_property
    def files(self) -> FilesTarget:
        """How files come here."""
        return self.adapters.files_target()

    async def _remove_files(self, params: dict[str, Any]) -> None:
        if self.deeds.recorded("restore"):
            raise FilesNotCopied("they stay, because what was restored, and may have them open, is not gone")
        await self.files.remove(params["before"])

    async def _load_restore(self) -> Restore:
        """Start the restore up to where it needs images, so that its start is not part of the freeze, and what keeps it
        from starting is found out while the service runs."""
        lazy = self._memory is not None
        external = self._memory.external if self._memory is not None else ()
        command = self.runtime.restore_command(self.images.images, self.images.work, lazy=lazy)
        self.deeds.record("restore", durable=False)
        hold, started = self.images.hold(), self.record_criu("restore")
        self._restore = await self.criu.restore(command, self.journal.path, started, hold, lazy=lazy, external=external)
        await self._restore.loaded()
        return self._restore

    async def _end_restore(self) -> None:
        await self.end_criu("restore", self._restore, self.plan.deadlines.resume_s)

    async def _prepare_memory(self) -> None:
        if self.plan.memory.mode != "stop-copy":
            self._memory = self.adapters.memory_destination()
            pid = await self._memory.start(self.images.work)
            self.deeds.record("memory", durable=False, pid=pid, started=self.adapters.start_time(pid) or 0)

    def _linger(self) -> None:
        """In doubt the tasks may come to run, and their memory is in this process."""
        if self._memory is not None:
            self.lingering = asyncio.ensure_future(_serve_to_the_end(self._memory))

    def _lost(self, why: LivemoveError) -> LivemoveError:
        message = f"committed, but the tasks do not run on {self.host}: {why}"
        if self._restore is None and self.deeds.recorded("memory"):
            return MemoryLost(f"{message} (before all their memory is there, the end of an agent is theirs)")
        return RestoreFailed(message, why.hint)

    async def _fill_in(self) -> LivemoveError | None:
        """The tasks run; bring all their memory in. Without it they are killed: better down than wrong."""
        if self._memory is None:
            return await self._filled_by_another()
        try:
            async with asyncio.timeout(self.plan.deadlines.fill_s):
                await self._memory.filled()
        except Exception as error:
            return as_livemove_error(error, "filling in memory")
        finally:
            await self._close_memory()
        if self.channel is not None:
            with contextlib.suppress(ChannelFailed):
                await self.channel.send(FilledIn())
        return None

    async def _filled_by_another(self) -> LivemoveError | None:
        """A recovery: an agent that ended in doubt may still fill the tasks in, and its guard lives until it has."""
        if not self.deeds.recorded("memory"):
            return None
        try:
            await self._end_memory(self.deeds.params("memory"))
        except LivemoveError:
            return InDoubt(f"the tasks run on {self.host}, and their memory is still coming in", "Recover again soon.")
        try:
            await self.runtime.adopt()
        except LivemoveError as error:
            return self._lost(error)
        return None

    async def _end_memory(self, params: dict[str, Any]) -> None:
        if self._memory is not None:
            await self._close_memory()
        elif params.get("pid") and not await self.adapters.wait_gone(params["pid"], params["started"]):
            raise AgentFailed(f"the guard of the memory (pid {params['pid']}) is still there")

    async def _close_memory(self) -> None:
        if self._fetcher is not None:
            await self._fetcher.close(ChannelFailed("pages are fetched no more"))
        if self._memory is not None:
            try:
                await self._memory.close()
            except (LivemoveError, OSError) as error:
                self.warn(f"ending the filling of memory on {self.host}: {error}")


async def _serve_to_the_end(memory: FillingMemory) -> None:
    """In doubt: whoever recovers this migration lets the tasks run or ends them; their pages are in this process."""
    try:
        await memory.filled()
    except LivemoveError:
        return  # the guard has killed them; the recovery finds them gone
    finally:
        await memory.close()
