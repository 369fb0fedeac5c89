"""The two ends of getting a workload's files to another host, each with a fake in ``fakes/files.py``."""

from __future__ import annotations

from typing import Any, Protocol

from coordinator.agent.channel import Channel
from coordinator.agent.messages import SyncBegin
from coordinator.events import Progress


class FilesSource(Protocol):
    """The source's end. With no tree to be copied or shared every verb does nothing."""

    @property
    def wanted(self) -> bool:
        """Whether there is anything to be done in the freeze."""

    def claim(self) -> None:
        """The workload is here: its directories are nobody's left-over."""

    async def copy(self, link: Channel, progress: Progress) -> None:
        """Copy everything, and then what has changed meanwhile, until that is little; the service runs.

        ``progress`` is told of the bytes sent; how many it will be is not known before the end.
        Raises ``FilesNotCopied``."""

    async def catch_up(self, root_pid: int, link: Channel) -> None:
        """Copy what has changed since; the service runs, and is to be frozen soon. Precondition: ``copy``."""

    async def last(self, root_pid: int, link: Channel) -> None:
        """The tasks are frozen: make both sides equal. Raises ``FilesNotCopied``, and ``FilesChanged`` if somebody
        else writes to them."""

    def check_untouched(self) -> None:
        """Raise ``FilesChanged`` if somebody has written to them since ``last``, as far as that is known."""

    def leave(self) -> None:
        """After the move: what is here is old. Durable, idempotent."""

    def close(self) -> list[str]:
        """Stop watching, end what runs; what was not as it should be, as warnings. Idempotent."""


class FilesTarget(Protocol):
    """The destination's end."""

    def look(self) -> list[dict[str, Any]]:
        """What has to be known to undo what is going to be made here, for the journal. Raises ``FilesNotCopied`` if
        something is in the way."""

    def make(self) -> None:
        """Make the directories that are not there."""

    async def receive(self, link: Channel, begin: SyncBegin) -> None:
        """Take one pass of one tree, to its end."""

    async def remove(self, before: list[dict[str, Any]]) -> None:
        """Undo ``make`` and every pass: what was not there is removed. What an earlier move left is still that.
        Idempotent."""

    def claim(self) -> None:
        """The workload is here: its directories are nobody's left-over any more. Idempotent."""
