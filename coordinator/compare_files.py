"""Ask source and destination for a workload's directories, and where two are not the same, for what is not."""

from __future__ import annotations

import asyncio
import gzip
import json
import secrets
from collections.abc import Mapping

from coordinator.errors import ProtocolError
from coordinator.facts import FilesFacts, Tree
from coordinator.preflight_files import first_difference
from coordinator.protocol import DescribeFiles, ListTree, WithdrawProbes
from coordinator.sessions import Session

#: To read every byte of what is said to be present, and to count what is to be copied.
READ_S = 1800.0
_WITHDRAW_S = 20.0


async def compare_files(
    ends: Mapping[str, Session], workload: str, trees: tuple[Tree, ...]
) -> tuple[dict[str, FilesFacts], dict[str, str]]:
    """The trees on both hosts, the source first in ``ends``; and for trees that differ, the first entry that does.

    What is shared gets a file on the source for as long as the destination looks for it; nothing else is changed."""
    if not trees:
        return {}, {}
    (here, source), (there, destination) = ends.items()
    nonce = secrets.token_hex(8)
    if any(tree.files == "shared" for tree in trees):  # probes have to be there before they are looked for
        try:
            first = await source.call(_describe(workload, trees, nonce, offer=True), READ_S)
            second = await destination.call(_describe(workload, trees, nonce, offer=False), READ_S)
        finally:
            await source.call(WithdrawProbes(), _WITHDRAW_S)
    else:
        request = _describe(workload, trees, nonce, offer=False)
        first, second = await asyncio.gather(*(each.call(request, READ_S) for each in ends.values()))
    differing = {}
    for tree, one, other in zip(trees, first.trees, second.trees, strict=True):
        if tree.files == "present" and one.digest and other.digest and one.digest != other.digest:
            listings = await asyncio.gather(*(_listing(session, tree.path) for session in (source, destination)))
            differing[tree.path] = first_difference(*listings)
    return {here: first, there: second}, differing


def _describe(workload: str, trees: tuple[Tree, ...], nonce: str, *, offer: bool) -> DescribeFiles:
    return DescribeFiles(workload=workload, trees=trees, nonce=nonce, offer=offer)


async def _listing(session: Session, path: str) -> dict[str, str]:
    reply = await session.call(ListTree(path=path), READ_S)
    try:
        entries = json.loads(gzip.decompress(reply.entries))
    except (OSError, EOFError, ValueError) as error:
        raise ProtocolError(f"the listing of {path} on {session.host.name} is none: {error}") from error
    return {str(name): str(each) for name, each in entries.items()}
