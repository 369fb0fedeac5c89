"""Choosing and comparing sockets."""

from dataclasses import replace
from pathlib import Path

import pytest

from netfix.errors import InvalidAddressError, KernelRefusedError
from netfix.sockets import (
    FakeSocketInventory,
    SocketRecord,
    difference,
    of_addresses,
    owned_by,
    socket_inodes,
    state_class,
)

A, A6 = "192.0.2.10", "2001:db8::10"
CONNECTION = SocketRecord("ipv4", "tcp", "ESTABLISHED", A, 7000, "192.0.2.1", 40000, 11, 0, 0)
LISTENER = SocketRecord("ipv4", "tcp", "LISTEN", A, 7000, "0.0.0.0", 0, 12, 0, 128)
WILDCARD4 = replace(LISTENER, local="0.0.0.0", inode=13)
WILDCARD6 = replace(LISTENER, family="ipv6", local="::", remote="::", inode=14)
ONLY6 = replace(WILDCARD6, v6only=True, inode=15)
ELSEWHERE = replace(CONNECTION, local="192.0.2.2", inode=16)
ALL = [CONNECTION, LISTENER, WILDCARD4, WILDCARD6, ONLY6, ELSEWHERE]


def test_sockets_of_an_address() -> None:
    assert of_addresses(ALL, [A]) == [CONNECTION, LISTENER]
    assert of_addresses(ALL, [A], wildcard=True) == [CONNECTION, LISTENER, WILDCARD4, WILDCARD6]
    assert of_addresses(ALL, [A6], wildcard=True) == [WILDCARD6, ONLY6]
    assert of_addresses(ALL, ["2001:DB8:0::10"]) == []
    with pytest.raises(InvalidAddressError):
        of_addresses(ALL, ["x"])


def test_sockets_of_a_process() -> None:
    ownerless = replace(CONNECTION, state="TIME_WAIT", inode=0)
    assert owned_by([*ALL, ownerless], {11, 13, 0, 99}) == [CONNECTION, WILDCARD4]


def test_nothing_is_different_when_only_inodes_queues_and_the_states_of_a_connection_are() -> None:
    after = [replace(CONNECTION, inode=77, receive_queue_bytes=5, state="CLOSE_WAIT"), replace(LISTENER, inode=78)]
    assert difference([CONNECTION, LISTENER], after) == ((), ())


def test_lost_and_new() -> None:
    other = replace(CONNECTION, remote_port=40001)
    assert difference([CONNECTION, LISTENER], [LISTENER, other]) == ((CONNECTION,), (other,))
    udp = replace(LISTENER, protocol="udp", state="UNCONNECTED")
    assert difference([udp], []).lost == (udp,)


def test_a_listener_is_no_connection() -> None:
    there = replace(LISTENER, state="CLOSE")
    assert difference([LISTENER], [there]) == ((LISTENER,), (there,))


def test_equal_sockets_are_counted() -> None:
    """SO_REUSEPORT: four listeners on one port, of which one did not come back."""
    four = [replace(LISTENER, inode=inode) for inode in range(20, 24)]
    lost, new = difference(four, four[:3])
    assert (len(lost), len(new)) == (1, 0)


def test_time_wait_is_nobodys() -> None:
    waiting = replace(CONNECTION, state="TIME_WAIT", inode=0)
    assert state_class(waiting) == ""
    assert difference([waiting], []) == difference([], [waiting]) == ((), ())


def test_socket_inodes_of_processes(tmp_path: Path) -> None:
    for pid, links in {1: ["socket:[11]", "pipe:[3]", "/dev/null"], 2: ["socket:[12]", "socket:[11]"], 3: []}.items():
        directory = tmp_path / str(pid) / "fd"
        directory.mkdir(parents=True)
        for number, target in enumerate(links):
            (directory / str(number)).symlink_to(target)
    assert socket_inodes([1, 2, 3, 4711], proc=tmp_path) == {11, 12}


async def test_the_fake_fails_when_told() -> None:
    inventory = FakeSocketInventory(ALL)
    inventory.fail_next = KernelRefusedError("no")
    with pytest.raises(KernelRefusedError):
        await inventory.sockets()
    assert await inventory.sockets() == ALL
    inventory.close()
    assert inventory.closed
