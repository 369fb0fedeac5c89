"""What the pattern service and its clients say to each other, both halves, without any socket.

A client opens with a hello: mode, a seed, and how often it wants frames by itself. Then either

- ask: it sends records of fixed size; each is answered by one frame that gives the record back, or
- stream: it sends whenever it likes; the server pushes frames of pseudo-random bytes made from the seed.

Every frame begins with the frame's number, how many bytes the server has received on this connection, and a
digest over all of them. Nothing of that is stored anywhere but in the server's memory, so a byte that was
lost, doubled or moved in either direction, or a server that forgot something, makes a frame that differs
from the one the client computes for itself. Records and frames have fixed sizes, so a damaged stream cannot
pass for a merely slow one.

A third mode, memory, asks the server how many pages of its ballast (`ballast.py`) it has ever found damaged.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections import deque

ASK, STREAM, MEMORY = b"a", b"s", b"m"

HELLO = struct.Struct("!c16sI")
"""Mode, seed, milliseconds between the server's own frames (stream mode only)."""

HEADER = struct.Struct("!QQ24s")
"""Frame number, bytes received so far (the hello included), digest of all of them."""

MEMORY_ANSWER = struct.Struct("!QQ")
"""Pages held, pages that were ever found to be wrong."""

RECORD_BYTES = 128
STREAM_BODY_BYTES = 984


class ProtocolError(ValueError):
    """The bytes at the beginning of a connection are not a hello."""


class RunningDigest:
    """How many bytes went by, and a digest of all of them."""

    def __init__(self) -> None:
        self.length = 0
        self._hash = hashlib.blake2b(digest_size=24)

    def add(self, data: bytes) -> None:
        self.length += len(data)
        self._hash.update(data)

    def header(self, number: int) -> bytes:
        return HEADER.pack(number, self.length, self._hash.digest())


def stream_body(seed: bytes, number: int) -> bytes:
    """The bytes that frame `number` of a stream carries: known to both sides, guessable by no one else."""
    return hashlib.shake_128(seed + number.to_bytes(8, "big")).digest(STREAM_BODY_BYTES)


class ServerHalf:
    """The server's state of one connection. Losing any of it shows in the next frame."""

    def __init__(self) -> None:
        self.mode: bytes | None = None
        self.interval_s = 0.0
        self._seed = b""
        self._received = RunningDigest()
        self._frames = 0
        self._input = bytearray()

    def feed(self, data: bytes) -> bytes:
        """Take what the client sent; return what it is to be answered at once."""
        self._input += data
        if self.mode is None:
            if len(self._input) < HELLO.size:
                return b""
            self._begin(self._take(HELLO.size))
        if self.mode == ASK:
            answers = []
            while len(self._input) >= RECORD_BYTES:
                record = self._take(RECORD_BYTES)
                answers.append(self._frame(record))
            return b"".join(answers)
        if self._input:
            self._take(len(self._input))
        return b""

    def next_stream_frame(self) -> bytes:
        return self._frame(stream_body(self._seed, self._frames))

    def _begin(self, hello: bytes) -> None:
        mode, self._seed, interval_ms = HELLO.unpack(hello)
        if mode not in (ASK, STREAM, MEMORY):
            raise ProtocolError(f"a connection began with {hello!r}, which is not a hello of this protocol")
        self.mode = mode
        self.interval_s = max(interval_ms, 1) / 1000

    def _take(self, size: int) -> bytes:
        data = bytes(self._input[:size])
        del self._input[:size]
        self._received.add(data)
        return data

    def _frame(self, body: bytes) -> bytes:
        frame = self._received.header(self._frames) + body
        self._frames += 1
        return frame


class ClientHalf:
    """The client's view of one connection: makes what is sent, and knows every byte that must come back."""

    def __init__(self, mode: bytes, seed: bytes, interval_ms: int) -> None:
        self.mode = mode
        self.frames = 0
        self._seed = seed
        self._hello = HELLO.pack(mode, seed, interval_ms)
        self._random = random.Random(seed)
        self._sent = 0
        self._unconfirmed = bytearray()  # sent, but in no frame that was checked yet
        self._server_saw = RunningDigest()
        self._asked: deque[bytes] = deque()
        self._input = bytearray()
        self._frame_bytes = HEADER.size + (RECORD_BYTES if mode == ASK else STREAM_BODY_BYTES)

    @property
    def unanswered(self) -> int:
        """Records that no checked frame has covered yet."""
        return -(-len(self._unconfirmed) // RECORD_BYTES)

    def hello(self) -> bytes:
        return self._remember(self._hello)

    def record(self) -> bytes:
        record = self._random.randbytes(RECORD_BYTES)
        self._asked.append(record)
        return self._remember(record)

    def check(self, data: bytes) -> int:
        """Compare what the server sent with what it had to send; return how many bytes differ.

        After a difference nothing on this connection means anything any more: the caller gives it up.
        """
        self._input += data
        wrong = 0
        while not wrong and len(self._input) >= self._frame_bytes:
            frame = bytes(self._input[: self._frame_bytes])
            del self._input[: self._frame_bytes]
            expected = self._expected(frame)
            if frame != expected:
                wrong = sum(got != due for got, due in zip(frame, expected, strict=True))
            self.frames += 1
        return wrong

    def _remember(self, data: bytes) -> bytes:
        self._sent += len(data)
        self._unconfirmed += data
        return data

    def _expected(self, frame: bytes) -> bytes:
        if self.mode == ASK:
            body = self._asked.popleft() if self._asked else bytes(RECORD_BYTES)
            position = HELLO.size + (self.frames + 1) * RECORD_BYTES
        else:
            # Where in our bytes the server was when it made this frame, only the frame can say.
            body = stream_body(self._seed, self.frames)
            position = HEADER.unpack_from(frame)[1]
        newly_seen = min(position, self._sent) - self._server_saw.length
        if newly_seen > 0:
            self._server_saw.add(bytes(self._unconfirmed[:newly_seen]))
            del self._unconfirmed[:newly_seen]
        return self._server_saw.header(self.frames) + body
