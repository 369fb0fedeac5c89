"""Server and clients over real sockets on 127.0.0.1, all in one thread, turn by turn; in between, a proxy that harms.

Nothing here sleeps or looks at how long something took: loops end when what they wait for happened, or fail.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest

from labs.clients.load import Load, Seen, commands
from labs.programs.ballast import Ballast
from labs.programs.pattern import HELLO
from labs.programs.pattern_server import PatternServer, listen

LIMIT_S = 20.0
LOCALHOST = "127.0.0.1"
LINGER_NOT = struct.pack("ii", 1, 0)  # closing then sends a RST

Mangle = Callable[[bytes], bytes]


def swapped(data: bytes) -> bytes:
    """Exchange the first byte with the first one that differs from it."""
    other = next(i for i in range(1, len(data)) if data[i] != data[0])
    return data[other : other + 1] + data[1:other] + data[:1] + data[other + 1 :]


class Proxy:
    """Passes bytes on between clients and the service, until it is told to do harm to one connection."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.listener = listen(LOCALHOST, 0)
        self.listener.setblocking(False)
        self._upstream = upstream
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.listener, selectors.EVENT_READ)
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        self.mangle_requests: Mangle | None = None
        self.mangle_answers: Mangle | None = None

    def turn(self) -> None:
        for key, _ in self._selector.select(0):
            if key.data is None:
                client = self.listener.accept()[0]
                server = socket.create_connection(self._upstream)
                self.pairs.append((client, server))
                for end, other in ((client, server), (server, client)):
                    self._selector.register(end, selectors.EVENT_READ, other)
            elif isinstance(key.fileobj, socket.socket):
                self._pass_on(key.fileobj, key.data)

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        data = source.recv(65536)
        if source is self.pairs[0][0] and self.mangle_requests:
            data, self.mangle_requests = self.mangle_requests(data), None
        if source is self.pairs[0][1] and self.mangle_answers:
            data, self.mangle_answers = self.mangle_answers(data), None
        sink.sendall(data)

    def cut_first(self, *, with_reset: bool) -> None:
        client, server = self.pairs[0]
        for end in (client, server):
            self._selector.unregister(end)
        if with_reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
        client.close()

    def close(self) -> None:
        self._selector.close()
        for end in [self.listener, *(end for pair in self.pairs for end in pair)]:
            end.close()


class Scene:
    """Service, proxy and clients, with their turns in hand."""

    def __init__(self, undo: contextlib.ExitStack, connections: int = 5, patience_s: float = LIMIT_S) -> None:
        listener = listen(LOCALHOST, 0)
        self.server = PatternServer([listener], Ballast(0), 0)
        undo.callback(self.server.close)
        self.proxy = Proxy(listener.getsockname())
        undo.callback(self.proxy.close)
        self.load = Load(LOCALHOST, self.proxy.listener.getsockname()[1], connections, patience_s)
        undo.callback(self.load.close)

    def play(self, until: Callable[[Seen], bool]) -> Seen:
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            self.load.turn(wait_s=0.001)
            self.proxy.turn()
            self.server.turn(0)
            seen = self.load.whole_run()
            if until(seen):
                return seen
        pytest.fail(f"did not happen; the clients saw {self.load.whole_run()}")

    def play_until_all_answered(self, frames: int) -> None:
        """Until every connection that is still alive got so many answers."""
        self.play(lambda _: all(each.half.frames >= frames for each in self.load.connections if each.alive))


@pytest.fixture
def undo() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def scene(undo: contextlib.ExitStack) -> Scene:
    scene = Scene(undo)
    scene.play_until_all_answered(3)
    return scene


def harmed(seen: Seen) -> bool:
    return bool(seen.wrong_bytes or seen.lost or seen.resets)


def test_without_harm_nothing_is_wrong(scene: Scene) -> None:
    scene.load.begin_hop()
    scene.play_until_all_answered(20)
    hop = scene.load.end_hop()
    assert (hop.connections, hop.lost, hop.resets, hop.wrong_bytes) == (5, 0, 0, 0)
    assert hop.answers >= 5 * 15
    assert len(hop.gaps_ms) == 5
    assert hop.troubles == []


@pytest.mark.parametrize("direction", ["requests", "answers"])
@pytest.mark.parametrize(
    "mangle",
    [
        pytest.param(lambda data: data[1:], id="dropped"),
        pytest.param(lambda data: data[:9] + data[8:], id="doubled"),
        pytest.param(swapped, id="swapped"),
        pytest.param(lambda data: data[:5] + bytes([data[5] ^ 255]) + data[6:], id="changed"),
        pytest.param(lambda data: data + data, id="repeated"),
    ],
)
def test_damaged_bytes_are_seen_and_only_on_their_connection(scene: Scene, direction: str, mangle: Mangle) -> None:
    scene.load.begin_hop()
    setattr(scene.proxy, f"mangle_{direction}", mangle)
    scene.play(harmed)
    hop = scene.load.end_hop()
    assert hop.wrong_bytes > 0
    assert (hop.lost, hop.resets) == (0, 0)
    assert len(hop.troubles) == 1
    assert "connection 0" in hop.troubles[0]
    assert scene.load.begin_hop().connections == 4


def test_a_reset_is_counted_as_a_reset(scene: Scene) -> None:
    scene.load.begin_hop()
    scene.proxy.cut_first(with_reset=True)
    scene.play(harmed)
    hop = scene.load.end_hop()
    assert (hop.connections, hop.lost, hop.resets, hop.wrong_bytes) == (5, 0, 1, 0)


def test_an_end_of_file_is_counted_as_lost() -> None:
    """Against a service that takes what comes and then leaves, so that nothing but the end arrives."""
    with contextlib.ExitStack() as undo:
        listener = undo.enter_context(listen(LOCALHOST, 0))
        load = Load(LOCALHOST, listener.getsockname()[1], 1)
        undo.callback(load.close)
        sock = undo.enter_context(listener.accept()[0])
        load.turn(wait_s=0.1)
        assert sock.recv(65536)
        sock.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LIMIT_S
        while load.connections[0].alive and time.monotonic() < deadline:
            load.turn(wait_s=0.01)
        seen = load.whole_run()
        assert (seen.lost, seen.resets, seen.wrong_bytes, seen.connections) == (1, 0, 0, 0)
        assert "closed by the other side" in seen.troubles[0]


def test_a_lost_connection_is_counted_in_its_hop_only_and_never_made_anew(scene: Scene) -> None:
    scene.proxy.cut_first(with_reset=True)
    scene.play(harmed)
    scene.load.begin_hop()
    scene.play_until_all_answered(10)
    hop = scene.load.end_hop()
    assert (hop.connections, hop.lost, hop.resets) == (4, 0, 0)
    assert hop.troubles == []
    assert len(scene.proxy.pairs) == 5


def test_a_service_that_says_nothing_is_given_up_as_lost(undo: contextlib.ExitStack) -> None:
    listener = undo.enter_context(listen(LOCALHOST, 0))
    load = Load(LOCALHOST, listener.getsockname()[1], 2, patience_s=0.05)
    undo.callback(load.close)
    deadline = time.monotonic() + LIMIT_S
    while any(each.alive for each in load.connections) and time.monotonic() < deadline:
        load.turn(wait_s=0.01)
    seen = load.finish()
    assert (seen.connections, seen.lost, seen.resets) == (2, 2, 0)


def test_two_address_families_and_memory_checked(undo: contextlib.ExitStack) -> None:
    listeners = [listen(LOCALHOST, 0), listen("::1", 0)]
    server = PatternServer(listeners, Ballast(1 << 20), dirty_mb_s=1)
    undo.callback(server.close)
    for listener in listeners:
        sock = undo.enter_context(socket.create_connection(listener.getsockname()[:2]))
        sock.sendall(HELLO.pack(b"m", bytes(16), 0))
        sock.setblocking(False)
        assert _answer(server, sock) == struct.pack("!QQ", 256, 0)


def test_a_stranger_is_shown_the_door_and_the_others_notice_nothing(scene: Scene) -> None:
    with socket.create_connection(scene.proxy._upstream) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n")
        stranger.setblocking(False)
        with contextlib.suppress(ConnectionResetError):
            assert _answer(scene.server, stranger) == b""
    scene.play_until_all_answered(10)
    assert not harmed(scene.load.whole_run())


def test_words_come_out_of_the_input_until_it_ends(scene: Scene) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as source:
        os.write(writing, b"begin\nend\nsnap")
        os.close(writing)
        assert list(commands(scene.load, source.fileno(), LIMIT_S)) == ["begin", "end"]


def _answer(server: PatternServer, sock: socket.socket) -> bytes:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        server.turn(0.01)
        with contextlib.suppress(BlockingIOError):
            return sock.recv(4096)
    pytest.fail("no answer")
