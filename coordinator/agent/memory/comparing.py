"""Compares shared objects that can be written to unseen with what was sent of them.

Once while the service runs, when the rounds are over: what differs then is sent, and the comparison in the freeze is
left with what was written since, and is quick where nothing was (``sent_digests``). What differs in the freeze is
forgotten, so that it goes the way of what was never sent: with ``handing_over``, or in CRIU's images.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from coordinator.agent.channel import Channel
from coordinator.agent.memory.handing_over import SharedFile
from coordinator.agent.memory.page_messages import consecutive
from coordinator.agent.memory.pages import BATCH_BYTES
from coordinator.agent.memory.runs import Spans, intersection
from coordinator.agent.memory.shared import Compared, SharedMemory


async def send_differing(link: Channel, shared: SharedMemory) -> int:
    """Send what differs of objects that may be written to meanwhile, or are gone; returns the bytes."""
    sent = 0
    for each in shared.compared():
        # One that is gone, or cannot be found, the comparison in the freeze forgets as a whole.
        with suppress(OSError, LookupError), _opened(each) as file:
            differing = await asyncio.to_thread(_differing, shared, each, file)
            for at, content in file.read(differing, BATCH_BYTES):
                await asyncio.to_thread(each.digests.note, at, content)
                await link.send(consecutive(each.number, at, content), content)
                sent += len(content)
    return sent


def forget_differing(shared: SharedMemory) -> None:
    """Nobody can write any more: the destination has what is sent, and has not changed since. Blocks for as long as it
    takes to read it all, some 0.5 s for each gigabyte with two processors."""
    for each in shared.compared():
        try:
            with _opened(each) as file:
                lost = _differing(shared, each, file)
        except (OSError, LookupError):  # the image has it then, for CRIU asks us before it passes over one
            lost = shared.sent(each.number)
        shared.forget(each.number, lost)


def _differing(shared: SharedMemory, each: Compared, file: SharedFile) -> Spans:
    """What is sent, is there, and differs. What is sent and not there is a hole, which is told at the end."""
    return each.digests.differing(file.read_at, intersection(shared.sent(each.number), file.data()))


def _opened(each: Compared) -> SharedFile:
    """Raises ``LookupError`` if nobody has it mapped where it was."""
    for pid, mapping in each.places:
        with suppress(OSError):
            file = SharedFile(pid, mapping)
            if file.inode == mapping.inode:
                return file
            file.close()
    raise LookupError("nobody has it mapped where it was")
