"""Players of a Teeworlds server: each asks and is answered, and sees the server's snapshots, whose ticks only go up."""

from __future__ import annotations

import asyncio
import random

from labs.clients import teeworlds_packets as packets
from labs.clients.sessions import Session, expect, main
from labs.clients.teeworlds_packets import Packet, chunk, number, text

VERSION, CLIENT = "0.7 802f1be60a05665f", 0x0705
"""What a client of 0.7.x says it is (src/game/version.h)."""

INFO, MAP_CHANGE, CONNECTION_READY, READY, ENTER_GAME, INPUT, PING, PING_REPLY = 1, 2, 5, 18, 19, 20, 26, 27
SNAPSHOTS = (6, 7, 8)
"""The system's messages (src/engine/shared/protocol.h). A snapshot has its tick first, and then that it builds upon."""

READY_TO_ENTER, START_INFO = 8, 27
"""The game's own messages (datasrc/network.py)."""

SKIN_PARTS = 6
RIGHT, FIRE_OFTEN = 1, 5
ASK_AGAIN_S = 0.5


def system(kind: int, body: bytes = b"") -> bytes:
    return number(kind << 1 | 1) + body


def game(kind: int, body: bytes = b"") -> bytes:
    return number(kind << 1) + body


def start_info(name: str) -> bytes:
    """Who we are: name, clan, country, and a skin of the usual parts."""
    skin = text("standard") * SKIN_PARTS + number(0) * SKIN_PARTS * 2
    return game(START_INFO, text(name) + text("") + number(-1) + skin)


class Inbox(asyncio.DatagramProtocol):
    """Keeps what comes until it is asked for."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes | Exception] = asyncio.Queue()

    def datagram_received(self, data: bytes, addr: object) -> None:
        self.queue.put_nowait(data)

    def error_received(self, exc: Exception) -> None:
        self.queue.put_nowait(exc)


class Player(Session):
    """One player, who runs about. A step is a question (PING) with its answer, and a move."""

    interval_s = 0.02

    def __init__(self, address: str, port: int, place: int) -> None:
        self._where, self._name = (address, port), f"player{place}"
        self._ours, self._theirs = random.getrandbits(31), packets.NO_TOKEN
        self._sent = self._received = 0
        self._tick = self._snapshots = self._steps = 0

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        self._transport, self._inbox = await loop.create_datagram_endpoint(Inbox, remote_addr=self._where)
        self._theirs = packets.token_in(await self._agree(packets.TOKEN))
        await self._agree(packets.CONNECT, packets.ACCEPT)
        self._say(system(INFO, text(VERSION) + text("") + number(CLIENT)))
        await self._hear(system(MAP_CHANGE))
        self._say(system(READY))
        await self._hear(system(CONNECTION_READY))
        self._say(start_info(self._name))
        await self._hear(game(READY_TO_ENTER))
        self._say(system(ENTER_GAME))
        while not self._snapshots:
            await self._messages()

    async def step(self) -> None:
        self._steps += 1
        fire = self._steps // FIRE_OFTEN
        move = (RIGHT if self._steps % 200 < 100 else -RIGHT, 100, 0, self._steps % 50 == 0, fire, 0, 0, 0, 0, 0)
        body = b"".join(map(number, (self._tick, self._tick + 1, 4 * len(move), *move, 0)))
        self._send(chunk(system(INPUT, body)), chunk(system(PING)))
        await self._hear(system(PING_REPLY))

    async def finish(self) -> None:
        before = self._snapshots
        while self._snapshots == before:
            await self._messages()
        self._transport.sendto(packets.control(packets.CLOSE, self._theirs))
        self._transport.close()

    async def _agree(self, kind: int, answer: int = packets.TOKEN) -> Packet:
        """Say who we are until the server answers that."""
        while True:
            self._transport.sendto(packets.control(kind, self._theirs, self._ours))
            try:
                async with asyncio.timeout(ASK_AGAIN_S):
                    while True:
                        packet = await self._packet()
                        if packet.flags & packets.CONTROL and packet.content[0] == answer:
                            return packet
            except TimeoutError:
                continue

    def _say(self, message: bytes) -> None:
        """Send a vital message."""
        self._sent = (self._sent + 1) % packets.SEQUENCE
        self._send(chunk(message, self._sent))

    def _send(self, *parts: bytes) -> None:
        self._transport.sendto(Packet(0, self._received, len(parts), self._theirs, b"".join(parts)).encoded())

    async def _hear(self, beginning: bytes) -> None:
        """Take messages up to one that begins so."""
        while not any(message.startswith(beginning) for message in await self._messages()):
            pass

    async def _packet(self) -> Packet:
        data = await self._inbox.queue.get()
        if isinstance(data, Exception):
            raise data
        packet = packets.opened(data)
        expect(packet.token, self._ours, "the token of a packet")
        if packet.flags & packets.CONTROL and packet.content[0] == packets.CLOSE:
            reason = packet.content[1:].rstrip(b"\0").decode(errors="replace")
            raise ConnectionResetError(f"closed by the server: {reason}")
        return packet

    async def _messages(self) -> list[bytes]:
        """The messages of the next packet, those that were sent again left out."""
        packet = await self._packet()
        found: list[bytes] = []
        for sequence, message in packets.chunks(packet):
            if sequence is not None:
                if sequence != (self._received + 1) % packets.SEQUENCE:
                    self._expect_old(sequence)
                    continue
                self._received = sequence
            found.append(message)
            kind, tick, *_ = [*packets.numbers(message[:12]), 0, 0]
            if kind & 1 and kind >> 1 in SNAPSHOTS:
                self._take_snapshot(tick)
        return found

    def _expect_old(self, sequence: int) -> None:
        behind = (self._received - sequence) % packets.SEQUENCE
        if behind >= packets.SEQUENCE // 2:
            raise ConnectionError(f"vital chunk {sequence} came after {self._received}: one between is lost")

    def _take_snapshot(self, tick: int) -> None:
        # One that is large comes in parts, all of the same tick.
        expect(tick >= self._tick, True, f"tick {tick} after {self._tick}: the server's time goes on")
        self._tick = tick
        self._snapshots += 1


def sessions(address: str, port: int, folder: str) -> list[Session]:
    return [Player(address, port, place) for place in range(1, 7)]


if __name__ == "__main__":
    main(sessions)
