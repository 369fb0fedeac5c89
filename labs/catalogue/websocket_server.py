"""A program behind nginx: a websocket (RFC 6455) that answers each short text with its number.

Argument: the UNIX socket to listen on. Standard library only, because it runs as a file of its own in a container.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import sys
from pathlib import Path

GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
TEXT, LENGTH = 0x81, 0x7F


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection, until its end."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        keys = [line.partition(": ")[2] for line in head if line.lower().startswith("sec-websocket-key: ")]
        accept = base64.b64encode(hashlib.sha1(f"{keys[0]}{GUID}".encode(), usedforsecurity=False).digest()).decode()
        upgrade = ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade"]
        writer.write("\r\n".join([*upgrade, f"Sec-WebSocket-Accept: {accept}", "", ""]).encode())
        count = 0
        while True:
            _, size = await reader.readexactly(2)
            mask = await reader.readexactly(4)
            masked = await reader.readexactly(size & LENGTH)
            count += 1
            answer = b"%d %s" % (count, bytes(byte ^ mask[at % 4] for at, byte in enumerate(masked)))
            writer.write(bytes([TEXT, len(answer)]) + answer)


async def main() -> None:
    name = sys.argv[1]
    server = await asyncio.start_unix_server(talk, name)
    Path(name).chmod(0o666)  # nginx's workers have a uid of their own
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
