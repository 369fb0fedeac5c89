"""A hold, and what comes and goes beside it: other holds, other tables, and at last its own process."""

import asyncio
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from netfix import nft
from netfix.errors import KernelRefusedError
from netfix.gate import CLOSED, OPEN, NftGate, releasing, remove_gate
from netfix.hold import NfqueueHold
from netfix.hooks import Hooks
from netfix.leftovers import find_leftovers, remove_leftover
from netfix.netlink import NETLINK_NETFILTER, NetlinkSocket
from tests.contract.netfix_held import datagram_socket, numbers_read, release, until_held
from tests.contract.netfix_segment import SERVICE, Segment

REPOSITORY = Path(__file__).parents[2]


async def test_a_queue_has_one_listener(cable: Segment, hold: NfqueueHold) -> None:
    second = NfqueueHold(number=hold.queue)
    with pytest.raises(KernelRefusedError, match="listener"):
        await cable.host.run(second.open())
    assert second.queue is None
    other = NfqueueHold()
    await cable.host.run(other.open())
    assert other.queue not in (None, hold.queue)
    await cable.host.call(other.close)


async def _sent_and_held(cable: Segment, hold: NfqueueHold, peer: socket.socket, number: int) -> None:
    peer.sendto(b"%d" % number, (SERVICE, 9000))
    await until_held(cable.host, hold, lambda report: report.waiting_packets == number)


def _delete_table(name: str) -> None:
    """As somebody does who does not ask."""
    with NetlinkSocket(NETLINK_NETFILTER, "test") as netlink:
        netlink.transact(nft.batch([nft.delete_table(nft.INET, name, nft.ACKNOWLEDGE)]))


async def test_the_kernel_throws_out_what_is_queued_when_any_hook_goes(
    cable: Segment, gate: NftGate, hold: NfqueueHold
) -> None:
    """Why a gate is opened with `set` before it is removed, and why it is removed only when nobody queues."""
    other = await cable.host.call(lambda: NftGate("other", [SERVICE]))
    with (
        closing(other),
        closing(await cable.host.call(lambda: datagram_socket(SERVICE, 9000))) as service,
        closing(await cable.peer.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))) as peer,
    ):
        await other.set(OPEN)
        await _sent_and_held(cable, hold, peer, 1)
        await other.set(CLOSED)
        await other.set(OPEN)
        await _sent_and_held(cable, hold, peer, 2)
        await cable.host.call(lambda: _delete_table("livemove-other"))
        await _sent_and_held(cable, hold, peer, 3)
        report = await release(cable, hold, gate)
        assert numbers_read(service) == [3]
        assert report.kernel_dropped == 2


@pytest.mark.parametrize("by", ["its gate", "its id"])
async def test_another_gate_opens_at_once_and_goes_when_nobody_queues(
    cable: Segment, gate: NftGate, hold: NfqueueHold, by: str
) -> None:
    other = await cable.host.call(lambda: NftGate("other", ["192.0.2.66"]))
    await other.set(CLOSED)
    with (
        closing(other),
        closing(await cable.host.call(lambda: datagram_socket(SERVICE, 9000))) as service,
        closing(await cable.peer.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))) as peer,
    ):
        await _sent_and_held(cable, hold, peer, 1)
        removal = asyncio.create_task(other.remove() if by == "its gate" else cable.host.run(remove_gate("other")))
        async with asyncio.timeout(5):
            while await other.state() != OPEN:  # noqa: ASYNC110 - the kernel tells nobody
                await asyncio.sleep(0.001)
        await _sent_and_held(cable, hold, peer, 2)
        await gate.set(releasing(hold.queue))
        await _sent_and_held(cable, hold, peer, 3)
        assert not removal.done()
        report = await release(cable, hold, gate)
        await removal
        assert await other.state() is None
        assert numbers_read(service) == [1, 2, 3]
        assert (report.released, report.kernel_dropped) == (3, 0)


async def test_what_criu_left_goes_when_nobody_queues(cable: Segment, gate: NftGate, hold: NfqueueHold) -> None:
    table, chain = nft.new_table(nft.INET, "CRIU-7"), nft.new_base_chain(nft.INET, "CRIU-7", "output", 3, 0)

    def make() -> None:
        with NetlinkSocket(NETLINK_NETFILTER, "test") as netlink:
            netlink.transact(nft.batch([table, chain, nft.new_table(nft.INET, "CRIU-7", nft.ACKNOWLEDGE)]))

    await cable.host.call(make)
    (left,) = [each for each in await cable.host.run(find_leftovers("test")) if each.kind == "criu-table"]
    with (
        closing(await cable.host.call(lambda: datagram_socket(SERVICE, 9000))) as service,
        closing(await cable.peer.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))) as peer,
    ):
        await _sent_and_held(cable, hold, peer, 1)
        removal = asyncio.create_task(cable.host.run(remove_leftover(left)))
        await asyncio.sleep(0)
        await _sent_and_held(cable, hold, peer, 2)  # asked in the same thread, and so after it
        assert not removal.done()
        await release(cable, hold, gate)
        await removal
        assert numbers_read(service) == [1, 2]
        assert await cable.host.run(find_leftovers("test")) == []


async def test_a_gate_does_not_wait_for_ever_to_be_removed(
    cable: Segment, hold: NfqueueHold, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("netfix.hooks.PATIENCE_S", 0)
    other = await cable.host.call(lambda: NftGate("other", ["192.0.2.66"]))
    with closing(other):
        await other.set(CLOSED)
        await other.remove()
        assert await other.state() is None


async def test_who_begins_to_queue_waits_for_a_removal(cable: Segment) -> None:
    one, another = await cable.host.call(Hooks), await cable.host.call(Hooks)
    elsewhere = await cable.peer.call(Hooks)
    with closing(one), closing(another), closing(elsewhere):
        async with one.alone():
            keeping = asyncio.create_task(another.keep())
            await elsewhere.keep()  # another network namespace is none of its business
            assert not keeping.done()
        await keeping
        await one.keep()  # both may


_HOLDER = """
import asyncio, sys
from netfix.gate import NftGate, holding
from netfix.hold import NfqueueHold

async def main():
    hold, gate = NfqueueHold(), NftGate("test", [sys.argv[1]])
    await hold.open()
    await gate.set(holding(hold.queue))
    print(hold.queue, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_when_its_process_is_killed_nothing_passes(cable: Segment) -> None:
    """Neither what was held nor what comes: the rule has no bypass flag."""

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", _HOLDER, SERVICE]
        return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY)

    with (
        closing(await cable.host.call(lambda: datagram_socket(SERVICE, 9000))) as service,
        closing(await cable.peer.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))) as peer,
        await cable.host.call(start) as holder,
    ):
        assert holder.stdout is not None
        try:
            assert int(await asyncio.to_thread(holder.stdout.readline)) > 0
            peer.sendto(b"1", (SERVICE, 9000))
            await cable.arrived()
        finally:
            holder.send_signal(signal.SIGKILL)
            await asyncio.to_thread(holder.wait)
        peer.sendto(b"2", (SERVICE, 9000))
        await cable.arrived()
        assert numbers_read(service) == []
        gate = await cable.host.call(lambda: NftGate("test", [SERVICE]))
        await gate.set(OPEN)
        peer.sendto(b"3", (SERVICE, 9000))
        await cable.arrived()
        assert numbers_read(service) == [3]
        await gate.remove()
        gate.close()
