"""What tests of a hold on a cable do again and again."""

import asyncio
import socket
from collections.abc import Callable

from netfix.gate import OPEN, NftGate, releasing
from netfix.hold import HoldReport, NfqueueHold
from tests.contract.netfix_segment import Namespace, Segment, family_of


def datagram_socket(address: str, port: int = 0) -> socket.socket:
    """A bound socket that does not block."""
    made = socket.socket(family_of(address), socket.SOCK_DGRAM)
    made.bind((address, port))
    made.setblocking(False)
    return made


async def until_held(host: Namespace, hold: NfqueueHold, enough: Callable[[HoldReport], bool]) -> HoldReport:
    """The hold's report as soon as it says that enough has come."""
    async with asyncio.timeout(10):
        while True:
            report = await host.call(hold.report)
            if enough(report):
                return report
            await asyncio.sleep(0)


async def release(cable: Segment, hold: NfqueueHold, gate: NftGate) -> HoldReport:
    """Let go what is held, and open the gate behind it."""
    await gate.set(releasing(hold.queue))
    return await cable.host.run(hold.release(lambda: gate.set(OPEN)))


def numbers_read(service: socket.socket) -> list[int]:
    """The numbers at the head of all datagrams that are there to be read."""
    found = []
    while True:
        try:
            found.append(int(service.recv(65536).split(b" ", 1)[0]))
        except BlockingIOError:
            return found
