"""What the source half and the destination half say to each other, over ``agent/channel.py``."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.facts import SocketFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelMessage:
    """Base of what the halves say to each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello(ChannelMessage):
    """Both sides' first message: the protocol version and the migration's id must agree."""

    version: int
    migration: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRestore(ChannelMessage):
    """Source: the dump stands before the freeze, bring the restore as far as it comes without images. Answered by
    ``RestoreLoaded``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreLoaded(ChannelMessage):
    """Destination: it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divert(ChannelMessage):
    """Source: answer for the addresses from now on, hold what arrives. Answered by ``Diverted``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diverted(ChannelMessage):
    """Destination: announced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished(ChannelMessage):
    """Source, diverted: these connections have no process here and are not finished. Answered by ``Kept``."""

    sockets: tuple[SocketFacts, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept(ChannelMessage):
    """Destination: what their peers have sent so far, as whole IP packets without data."""

    packets: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenNow(ChannelMessage):
    """Source: the gate is closed and the tasks are being frozen; images follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedConnections(ChannelMessage):
    """Source: the payload is entries of the connection table (``netfix.ctnetlink``) for the destination to make.
    Answered by ``ConnectionsTracked`` if ``acknowledge``."""

    acknowledge: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionsTracked(ChannelMessage):
    """Destination: all entries that were sent are in the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageChunk(ChannelMessage):
    """Source: the payload is the next part of the image file ``name``; ``offset`` in bytes."""

    name: str
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallImages(ChannelMessage):
    """Source: the payload is the whole of several image files, one after the other; ``sizes`` in bytes."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredParts(ChannelMessage):
    """Source: these parts of the pages image ``name`` are pages that the destination has from the rounds, as those of
    ``pid`` (below zero: a shared object). ``offsets`` are bytes in the image."""

    name: str
    pid: int
    offsets: tuple[int, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesComplete(ChannelMessage):
    """Source: all images are sent. ``sizes`` maps every file to its bytes, for the destination to compare;
    ``pages_later``: pages that were not sent are to be fetched, rather than zero."""

    sizes: dict[str, int]
    pages_later: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged(ChannelMessage):
    """Destination: everything exists, nothing has run (READY)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Go(ChannelMessage):
    """Source: COMMITTED is on my disk; run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(ChannelMessage):
    """Destination: the tasks run, and what was held for them is on its way to them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp(ChannelMessage):
    """Either side, before the commit point: I abort, undo yours. Answered by ``GaveUp`` when the sender must wait."""

    error: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class GaveUp(ChannelMessage):
    """The answer to ``GiveUp``: this side no longer answers for the addresses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageBatch(ChannelMessage):
    """Source: the payload is the content of these runs of pages, one after the other. ``pid`` is that of CRIU's images;
    ``starts`` are addresses, ``counts`` pages."""

    pid: int
    starts: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedObject(ChannelMessage):
    """Source: pages of the pid ``number``, which is below zero, are those of a shared object, by their offsets in it.
    ``name`` as for memfd_create(2); ``sealable``: with MFD_ALLOW_SEALING."""

    number: int
    name: str
    sealable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedOver(ChannelMessage):
    """Source, frozen: all of a shared object was sent, ``size`` in bytes. The images have it empty; what CRIU restores
    when it opens ``image`` is to be the destination's own. The process ``pid`` has it mapped at ``address``."""

    number: int
    image: str
    size: int
    pid: int
    address: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TmpfsMount(ChannelMessage):
    """Source: a tmpfs of the workload that CRIU leaves to us. ``source`` and ``options`` (those of the file system) as
    in mountinfo (proc(5)); in the restored workload it is at ``point``."""

    mount: int
    point: str
    source: str
    options: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TmpfsFile(ChannelMessage):
    """Source: pages of the pid ``number``, which is below zero, are those of a file of that mount, by their offsets."""

    number: int
    mount: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TmpfsFileGone(ChannelMessage):
    """Source: that file has been removed."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TmpfsEntries(ChannelMessage):
    """Source, frozen: the payload is some of what is in a mount (``memory/tmpfs_entries``), directories before what is
    in them; ``sizes`` in bytes, of the list and of the contents behind it. ``complete``: there is no more."""

    mount: int
    sizes: tuple[int, int]
    complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedPages(ChannelMessage):
    """Source: these pages hold nothing any more (unmapped, discarded, zero)."""

    pid: int
    starts: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessGone(ChannelMessage):
    """Source: forget all pages of this process."""

    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundEnd(ChannelMessage):
    """Source: a pre-copy round is sent. Answered by ``RoundStored``."""

    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStored(ChannelMessage):
    """Destination: all pages of the round are in the store."""

    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchPages(ChannelMessage):
    """Destination, after Resumed: send these pages of the frozen tasks now. Answered by ``FetchedPages``."""

    number: int
    pid: int
    address: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedPages(ChannelMessage):
    """Source: the payload is what was asked for under that number."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FilledIn(ChannelMessage):
    """Destination: every page is in the tasks; the frozen source is needed no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncBegin(ChannelMessage):
    """Source: a pass over the plan's tree of that number begins, for which the destination starts rsync with these
    arguments. ``SyncBytes`` follow from both sides, until each has sent one without a payload; then ``SyncEnded``."""

    tree: int
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncBytes(ChannelMessage):
    """Either side: the payload is what rsync says to the other one; empty at its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncEnded(ChannelMessage):
    """Destination: rsync has ended with that status (rsync(1), EXIT VALUES), and what it complained of."""

    status: int
    said: str


# A dataclass with slots is a second class of its name, made after the first: it is the one that stays.
CHANNEL_MESSAGES: dict[str, type[ChannelMessage]] = {kind.__name__: kind for kind in ChannelMessage.__subclasses__()}
