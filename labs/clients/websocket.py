"""A client of a websocket (RFC 6455) that answers each text with its number: of node, and of nginx with a program
behind it."""

from __future__ import annotations

import base64
import os

from labs.clients.sessions import Session, Stream, WrongAnswer, expect


class Websocket(Session):
    """Short texts, one after the other."""

    def __init__(self, address: str, port: int) -> None:
        self._where, self._count = (address, port), 0

    async def open(self) -> None:
        self._stream = await Stream.connect(*self._where)
        key = base64.b64encode(os.urandom(16)).decode()
        upgrade = ["GET /websocket HTTP/1.1", "Host: lab", "Connection: Upgrade", "Upgrade: websocket"]
        request = [*upgrade, "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}", "", ""]
        self._stream.send("\r\n".join(request).encode())
        answer = (await self._stream.until(b"\r\n\r\n")).decode().splitlines()
        if answer[0].split()[1] != "101":
            raise WrongAnswer(f"asked for a websocket: {answer[0]}")

    async def step(self) -> None:
        self._count += 1
        text, mask = os.urandom(20).hex().encode(), os.urandom(4)
        masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(text))
        self._stream.send(bytes([0x81, 0x80 | len(text)]) + mask + masked)
        kind, size = await self._stream.exactly(2)
        expect((kind, await self._stream.exactly(size)), (0x81, b"%d %s" % (self._count, text)), "the websocket")
