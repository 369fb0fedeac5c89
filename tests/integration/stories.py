"""What is done with connections of every state that CRIU can dump, before a move, after it, and after the way back."""

from __future__ import annotations

import socket
from collections.abc import Callable
from socket import IPPROTO_IP, IPPROTO_TCP, SOL_SOCKET

from tests.integration.faults import until
from tests.integration.puppets import IPV4_PORT, IPV6_PORT, MAPPED_PORT, Pair, Story

STORIES: dict[str, Callable[[Pair], Story]] = {}
SMALL = ((SOL_SOCKET, socket.SO_RCVBUF, 4096),)
OFFERED = ("tcp_timestamps", "tcp_sack")
FAMILIES = {"ipv4": IPV4_PORT, "ipv6": IPV6_PORT, "mapped": MAPPED_PORT}


def story(tell: Callable[[Pair, str, int], Story]) -> Callable[[Pair, str, int], Story]:
    """Tell this story over IPv4, over IPv6, and over IPv4 to a socket of IPv6."""
    for family, port in FAMILIES.items():
        name = f"{tell.__name__} {family}"
        STORIES[name] = lambda one, name=name, port=port: tell(one, name, port)  # type: ignore[misc]
    return tell


@story
def idle(one: Pair, name: str, port: int) -> Story:
    one.connect(name, port)
    one.exchange(name)
    yield
    one.exchange(name)
    yield
    one.exchange(name)
    one.note(name, one.service("state", name))


@story
def unread_by_the_service(one: Pair, name: str, port: int) -> Story:
    one.connect(name, port)
    one.client("send", name, size=50_000)
    until(lambda: one.service("state", name)["unread"] == 50_000, name)
    yield
    one.note(name, one.service("state", name)["unread"])
    one.to_service(name, 20_000)
    yield
    one.to_service(name, 30_000)
    one.exchange(name)


@story
def zero_window_of_the_service(one: Pair, name: str, port: int) -> Story:
    one.connect(name, port)
    sent = one.client("fill", name)["bytes"]
    yield
    sent += one.client("fill", name)["bytes"]
    one.to_service(name, sent)
    sent = one.client("fill", name)["bytes"]
    yield
    one.to_service(name, sent)
    one.exchange(name)


@story
def zero_window_of_the_client(one: Pair, name: str, port: int) -> Story:
    one.connect(name, port, options=SMALL)
    sent = one.service("fill", name)["bytes"]
    yield
    assert one.service("state", name)["unacknowledged"] > 0
    one.to_client(name, sent)
    sent = one.service("fill", name)["bytes"]
    yield
    one.to_client(name, sent)
    one.exchange(name)


@story
def both_windows_closed(one: Pair, name: str, port: int) -> Story:
    one.connect(name, port, options=SMALL)
    there, back = one.client("fill", name)["bytes"], one.service("fill", name)["bytes"]
    yield
    yield
    one.to_client(name, back)
    one.to_service(name, there)
    one.exchange(name)


@story
def close_wait(one: Pair, name: str, port: int) -> Story:
    """The client has ended, and said something before that is not read."""
    one.connect(name, port)
    one.client("send", name, size=3000)
    one.client("shutdown", name)
    until(lambda: one.service("state", name)["state"] == "CLOSE_WAIT", name)
    yield
    one.note(name, one.service("state", name)["state"])
    one.to_service(name, 3000)
    one.note(name, one.service("end", name))
    one.service("send", name, size=2000)
    one.to_client(name, 2000)
    yield
    one.service("send", name, size=2000)
    one.service("close", name)
    one.to_client(name, 2000)
    one.note(name, one.client("end", name))


@story
def fin_wait_2(one: Pair, name: str, port: int) -> Story:
    """The service has ended, and the client knows."""
    one.connect(name, port)
    one.service("send", name, size=2000)
    one.service("shutdown", name)
    one.to_client(name, 2000)
    one.note(name, one.client("end", name))
    yield
    one.note(name, one.service("state", name)["state"])
    one.client("send", name, size=3000)
    one.to_service(name, 3000)
    yield
    one.client("send", name, size=3000)
    one.client("close", name)
    one.to_service(name, 3000)
    one.note(name, one.service("end", name))


@story
def fin_wait_1(one: Pair, name: str, port: int) -> Story:
    """The service has ended, and the client has no room for its last words."""
    one.connect(name, port, options=SMALL)
    sent = one.service("fill", name)["bytes"]
    one.service("shutdown", name)
    yield
    one.note(name, one.service("state", name)["state"])
    yield
    one.to_client(name, sent)
    one.note(name, one.client("end", name))
    one.client("send", name, size=1000)
    one.to_service(name, 1000)


@story
def closing(one: Pair, name: str, port: int) -> Story:
    """Both have ended at once, and the client has no room for the service's last words."""
    one.connect(name, port, options=SMALL)
    sent = one.service("fill", name)["bytes"]
    one.service("shutdown", name)
    one.client("send", name, size=1000)
    one.client("shutdown", name)
    until(lambda: one.service("state", name)["state"] == "CLOSING", name)
    yield
    one.note(name, one.service("state", name)["state"])
    yield
    one.to_client(name, sent)
    one.note(name, one.client("end", name))
    one.to_service(name, 1000)
    one.note(name, one.service("end", name))


@story
def last_ack(one: Pair, name: str, port: int) -> Story:
    """The client has ended, then the service, for whose last words the client has no room."""
    one.connect(name, port, options=SMALL)
    one.client("shutdown", name)
    one.note(name, one.service("end", name))
    sent = one.service("fill", name)["bytes"]
    one.service("shutdown", name)
    until(lambda: one.service("state", name)["state"] == "LAST_ACK", name)
    yield
    one.note(name, one.service("state", name)["state"])
    yield
    one.to_client(name, sent)
    one.note(name, one.client("end", name))


@story
def time_wait(one: Pair, name: str, port: int) -> Story:
    """The service has closed, and its host remembers. The client connects again from the same port, and is moved to
    where that is remembered."""
    local = 30_000 + port
    one.connect(name, port, local_port=local)
    one.exchange(name)
    _ended_by_the_service(one, name)
    yield
    one.connect(name, port, local_port=local)
    one.exchange(name)
    yield
    one.exchange(name)
    _ended_by_the_service(one, name)
    one.connect(name, port, local_port=local)
    one.exchange(name)


def _ended_by_the_service(one: Pair, name: str) -> None:
    one.service("shutdown", name)
    one.note(name, one.client("end", name))
    one.client("close", name)
    one.note(name, one.service("end", name))
    one.service("close", name)


@story
def urgent_data_that_was_read(one: Pair, name: str, port: int) -> Story:
    one.connect(name, port)
    one.client("send_urgent", name, text="ab!")
    one.note(name, one.service("receive_text", name, size=1, urgent=True))
    one.note(name, one.service("receive_text", name, size=9))
    yield
    one.exchange(name)
    one.client("send_urgent", name, text="cd?")
    one.note(name, one.service("receive_text", name, size=1, urgent=True))
    one.note(name, one.service("receive_text", name, size=9))
    one.exchange(name)
    yield
    one.service("send_urgent", name, text="ef.")
    one.note(name, one.client("receive_text", name, size=1, urgent=True))
    one.note(name, one.client("receive_text", name, size=9))
    one.exchange(name)


@story
def urgent_data_in_line(one: Pair, name: str, port: int) -> Story:
    one.connect(name, port)
    one.service("set", name, level=SOL_SOCKET, option=socket.SO_OOBINLINE, value=1)
    for text in ("ab!", "cd?", "ef."):
        one.client("send_urgent", name, text=text)
        one.note(name, one.service("receive_text", name, size=9))
        one.note(name, one.service("marked", name))
        one.note(name, one.service("receive_text", name, size=9))
        if text != "ef.":
            yield
    one.exchange(name)


OPTIONS: list[tuple[int, int, int | list[int]]] = [
    (SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (IPPROTO_TCP, socket.TCP_KEEPIDLE, 77),
    (IPPROTO_TCP, socket.TCP_KEEPINTVL, 7),
    (IPPROTO_TCP, socket.TCP_KEEPCNT, 5),
    (IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (SOL_SOCKET, socket.SO_LINGER, [1, 9]),
    (SOL_SOCKET, socket.SO_RCVBUF, 50_000),
    (SOL_SOCKET, socket.SO_SNDBUF, 60_000),
    (SOL_SOCKET, socket.SO_PRIORITY, 3),
    (SOL_SOCKET, socket.SO_MARK, 5),
    (IPPROTO_IP, socket.IP_TOS, 0x10),
    (IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 12_345),
    (IPPROTO_TCP, socket.TCP_MAXSEG, 1000),
]


@story
def options(one: Pair, name: str, port: int) -> Story:
    one.connect(name, port)
    wanted = [each for each in OPTIONS if each[0] != IPPROTO_IP or port == IPV4_PORT]
    for level, option, value in wanted:
        one.service("set", name, level=level, option=option, value=value)
    for _ in range(2):
        yield
        for level, option, _ in wanted:
            one.note(f"{name} {level} {option}", one.service("get", name, options=[(level, option)]))
        one.exchange(name)


@story
def corked(one: Pair, name: str, port: int) -> Story:
    one.connect(name, port)
    one.service("set", name, level=IPPROTO_TCP, option=socket.TCP_CORK, value=1)
    one.service("send", name, size=10)
    yield
    one.note(name, one.service("get", name, options=[(IPPROTO_TCP, socket.TCP_CORK)]))
    one.service("send", name, size=10)
    yield
    one.service("set", name, level=IPPROTO_TCP, option=socket.TCP_CORK, value=0)
    one.to_client(name, 20)
    one.exchange(name)


@story
def large_windows(one: Pair, name: str, port: int) -> Story:
    """Four megabytes each way need window scales that fit what was negotiated."""
    one.connect(name, port, options=((SOL_SOCKET, socket.SO_RCVBUF, 4 << 20),))
    one.note(name, one.service("state", name))
    for _ in range(2):
        yield
        state = one.service("state", name)
        one.note(name, (state["options"], state["scales"]))
        sent = one.service("fill", name)["bytes"]
        one.to_client(name, sent)
        one.exchange(name, 200_000)
        one.note(f"{name} segments", one.service("get", name, options=[(IPPROTO_TCP, socket.TCP_MAXSEG)]))


@story
def without_options(one: Pair, name: str, port: int) -> Story:
    """Connections without timestamps and without SACK: the client does not offer them."""
    names = [f"{name} {sysctl}" for sysctl in OFFERED]
    for each, sysctl in zip(names, OFFERED, strict=True):
        with one.client_offers_no(f"net.ipv4.{sysctl}"):
            one.connect(each, port)
        one.note(each, one.service("state", each))
    for _ in range(2):
        yield
        for each in names:
            state = one.service("state", each)
            one.note(each, (state["options"], state["scales"]))
            one.exchange(each, 100_000)
