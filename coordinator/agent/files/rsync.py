"""rsync on both hosts, which talk to each other through the agents' own channel.

The source's rsync starts what it takes for a remote shell. That is a few lines of ours, which tell us the command that
is wanted on the other host, and then copy between rsync and the pipes that rsync has got from us as its own standard
input and output. The destination's agent starts that command, in the tree, as the plan names it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from coordinator.agent.channel import Channel, peer_aborted
from coordinator.agent.files.changes import ToSend
from coordinator.agent.messages import GiveUp, SyncBegin, SyncBytes, SyncEnded
from coordinator.agent.process import PIPE_BYTES, Command, Piped, start_piped
from coordinator.errors import FilesNotCopied, ProtocolError

#: Links, modes, times, owners, devices, sockets and pipes, hard links, access control lists, attributes, holes; owners
#: by number; times to the nanosecond; a directory may give way to a file.
_EVERYTHING = ("-lptgoDHAXS", "--numeric-ids", "--modify-window=-1", "--force")
_WHOLE_TREE = ("-r", "-x", "--delete")
#: What is listed is compared byte by byte, and what is listed and not there goes.
_LISTED = ("-I", "--from0", "--delete-missing-args")
#: A listed directory has nothing in it but what it has on the source.
_REPLACED = ("-r", "--delete")
#: Every path has its parents with it, and the tree's own directory is a parent; listed by itself, it would be copied
#: with what is in it. So this, which no tree has, stands for it.
_ROOT = b".livemove-root"

#: Stands for the remote shell, which ends when the other side has. $PPID is rsync.
_SHELL = """\
printf '%s\\0' "$@" '' >/proc/$PPID/fd/1
exec 3<&0
cat <&3 >/proc/$PPID/fd/1 &
cat </proc/$PPID/fd/0
kill $!
"""
_PEER, _HERE = "peer", (".", ".")
_HEADER_END = b"\0\0"
_END_S = 10.0

#: rsync(1), EXIT VALUES.
SOCKET_BROKEN, STREAM_BROKEN, PARTIAL, VANISHED = 10, 12, 23, 24


@dataclass(frozen=True, slots=True)
class Ended:
    """How a pass ended: the statuses of both, and the first complaint."""

    status: int
    complaint: str


class Rsync:
    """Passes over trees, from the source. ``work``: a directory for what rsync is told and says."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._running: Piped | None = None

    async def send(
        self, link: Channel, number: int, folder: str, sent: Callable[[int], None], what: ToSend | None = None
    ) -> Ended:
        """One pass over the tree ``number`` of the plan, which is ``folder`` here: all of it, or only ``what``.

        ``sent`` is told how many bytes have gone each time."""
        shell = self._work / "rsync-shell"
        shell.write_text(_SHELL)
        how: tuple[str, ...] = _WHOLE_TREE
        if what is not None:
            named = self._work / "rsync-paths"
            paths = (_ROOT if path == "." else os.fsencode(path) for path in what.paths)
            # With "./" in front none of them is a comment or an option.
            named.write_bytes(b"".join(b"./" + path + b"\0" for path in paths))
            how = (*_LISTED, *(_REPLACED if what.replaced else ()), f"--files-from={named}")
        remote = ("--blocking-io", "-e", f"sh {shlex.quote(str(shell))}")  # else its cat fails where it should wait
        argv = ("rsync", *_EVERYTHING, *how, *remote, _HERE[0], f"{_PEER}:{_HERE[1]}")
        complaints = self._work / "rsync-complaints"
        running = self._running = await start_piped(Command(argv, {}), folder, complaints)
        try:
            header = await running.reader.readuntil(_HEADER_END)
            arguments = tuple(header[: -len(_HEADER_END)].decode().split("\0"))
            await link.send(SyncBegin(tree=number, arguments=arguments))
            ended = await _talk(link, running, SyncEnded, sent)
            status = await running.wait()
        except asyncio.IncompleteReadError as error:
            raise FilesNotCopied(f"{running.command}: {_first_line(complaints.read_text(errors='replace'))}") from error
        finally:
            running.close()
            await running.wait()
        return Ended(ended.status or status, _first_line(ended.said + complaints.read_text(errors="replace")))

    def close(self) -> None:
        """End a pass that is under way. Idempotent."""
        if self._running is not None:
            self._running.close()
            self._running = None


async def receive(link: Channel, begin: SyncBegin, folder: str, complaints: Path) -> None:
    """The destination's side of a pass, into ``folder``; what rsync complains of goes to the file ``complaints``."""
    peer, *argv = begin.arguments
    if peer != _PEER or argv[:2] != ["rsync", "--server"] or tuple(argv[-2:]) != _HERE:
        raise ProtocolError(f"the source asks for {argv}, which is no rsync into a tree")
    running = await start_piped(Command(tuple(argv), {}), folder, complaints)
    try:
        await _talk(link, running, None)
        status = await running.wait()
    finally:
        running.close()
        await running.wait()
    await link.send(SyncEnded(status=status, said=complaints.read_text(errors="replace")))


async def _talk(
    link: Channel, running: Piped, last: type[SyncEnded] | None, sent: Callable[[int], None] = lambda _: None
) -> SyncEnded:
    """Carry bytes both ways until both have ended. The source reads on to the destination's last word."""
    sending = asyncio.ensure_future(_send_all(link, running, sent))
    try:
        while True:
            message, payload = await link.receive()
            if isinstance(message, GiveUp):
                raise peer_aborted(message)
            if last is not None and isinstance(message, last):
                return message
            if not isinstance(message, SyncBytes):
                raise ProtocolError(f"the other half sent {type(message).__name__} in the middle of a pass")
            await running.feed(payload)
            if not payload and last is None:
                return SyncEnded(status=0, said="")
    except BaseException:
        sending.cancel()
        raise
    finally:
        with contextlib.suppress(asyncio.CancelledError):
            await sending


def _first_line(text: str) -> str:
    """rsync's first complaint explains; the later ones are consequences."""
    return next(filter(None, map(str.strip, text.splitlines())), "no output")


async def _send_all(link: Channel, running: Piped, sent: Callable[[int], None]) -> None:
    while data := await running.reader.read(PIPE_BYTES):
        await link.send(SyncBytes(), data)
        sent(len(data))
    await link.send(SyncBytes())
