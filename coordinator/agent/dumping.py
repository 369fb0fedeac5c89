"""The dump of a source half: CRIU, held before and behind it, what is sent while it goes on, and its end.

The tasks' memory is the other part of it: CRIU leaves to us what we send (docs/how-it-works.md).
"""

from __future__ import annotations

import asyncio
from functools import cached_property
from typing import Any

from coordinator.agent.criu import Dump
from coordinator.agent.half import Half
from coordinator.agent.memory.copying import MemorySource
from coordinator.agent.outgoing import NOTHING_SENT, SentImages, send_finished, send_images
from coordinator.agent.runtimes.base import Tasks
from coordinator.errors import LivemoveError, WorkloadNotRunning


class DumpingHalf(Half):
    """What a source half knows of CRIU's dump and of memory."""

    _dump: Dump | None = None
    _root_pid: int = 0
    _sent: SentImages = NOTHING_SENT

    @cached_property
    def memory(self) -> MemorySource:
        """How memory gets to the destination."""
        return self.adapters.memory_source(self.plan.memory)

    async def _running(self) -> Tasks:
        tasks = await self.runtime.find()
        if tasks.state != "running":
            raise WorkloadNotRunning(f"workload {self.plan.workload.name} is {tasks.state} on {self.host}")
        return tasks

    async def _load_criu(self) -> Dump:
        """Start CRIU up to its last step before the freeze, so that its start is not part of the freeze."""
        lazy = self.memory.lazy
        command = self.runtime.dump_command(await self._running(), self.images.images, self.images.work, lazy=lazy)
        self.deeds.record("dump", durable=False)
        self._dump = await self.criu.dump(
            command,
            self.journal.path,
            self.record_criu("dump"),
            root_pid=self._root_pid,
            lazy=lazy,
            hidden=self.memory.hidden,
            at_freeze=self.memory.at_freeze,
            external=self.memory.external,
        )
        await self._dump.ready()
        # What the runtime has written by now (runc: the container's standard streams) a restore needs to be loaded.
        await send_images(self._link(), self.images, {}, self.progress)
        return self._dump

    async def _dumped(self, dump: Dump) -> None:
        """Wait for CRIU's dump, and send meanwhile what it has finished with."""
        dumped = asyncio.ensure_future(dump.dumped())
        try:
            self._sent = await send_finished(self._link(), self.images, dumped, self.progress, self._begin_last)
            await dumped
        finally:
            if not dumped.done():
                dumped.cancel()
                await asyncio.wait((dumped,))

    def _begin_last(self) -> None:
        self.memory.begin_last(self._root_pid, self._link())

    async def _send_images(self) -> None:
        """Send CRIU's images; of shared memory, what the destination does not have from the rounds."""
        stored = self.memory.images(self.images)
        self._sent = await send_images(self._link(), self.images, stored, self.progress, self._sent)

    def _step_back(self) -> None:
        """The destination runs, and no client waits for anything here."""
        self.adapters.pace("background")
        if self._dump is not None:
            self._dump.step_back()

    async def _end_dump(self) -> None:
        await self.end_criu("dump", self._dump, self.plan.deadlines.release_s)

    async def _close_memory(self) -> None:
        """Whatever is left in the tasks must not keep them from running, or the host from being cleaned up."""
        try:
            await self.memory.close()
        except (LivemoveError, OSError) as error:
            self.warn(f"ending the tracking of memory on {self.host}: {error}")

    async def _thaw(self, _: dict[str, Any]) -> None:
        """CRIU's hook reads ABORTED and CRIU thaws the tasks. The gate is still closed."""
        await self._end_dump()
