"""What is waited for before the freeze: scripted looks, and a clock that stands still until somebody sleeps."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from coordinator.agent.fakes.clock import run
from coordinator.agent.settling import HANDSHAKE_S, POLL_S, QUIET_S, YOUNG_S, Settling, losses
from coordinator.errors import NotAccepting
from coordinator.protocol import Deadlines
from netfix.sockets import SocketRecord

A, PEER = "192.0.2.200", "192.0.2.99"
LISTENER = SocketRecord("ipv4", "tcp", "LISTEN", A, 7000, "0.0.0.0", 0, 5, 2, 128)
OTHER_LISTENER = replace(LISTENER, inode=6)
UNREAD = SocketRecord("ipv4", "tcp", "ESTABLISHED", A, 7000, PEER, 40000, 7, 10, 0)
DATAGRAMS = SocketRecord("ipv4", "udp", "UNCONNECTED", A, 53, "0.0.0.0", 0, 8, 1536, 0)
CLOSED = SocketRecord("ipv4", "tcp", "FIN_WAIT1", A, 7000, PEER, 40001, 0, 0, 501, unsent_bytes=101)
CLOSED_LATER = replace(CLOSED, remote_port=40002)
HANDSHAKE = SocketRecord("ipv4", "tcp", "SYN_RECV", A, 7000, PEER, 40003, 0, 0, 0)
BOUNDS = Deadlines(close_s=2.0, accept_s=1.0, settle_s=0.005)

Scene = list[SocketRecord]


class Script:
    """Looks that show one scene after the other, the last one for ever; each takes `look_s`. `at` is when they were."""

    def __init__(self, *scenes: Scene, look_s: float = 0.0) -> None:
        self.scenes = scenes
        self.look_s = look_s
        self.at: list[float] = []
        self.asked: list[Scene] = []

    async def look(self) -> Scene:
        self.at.append(_now())
        await asyncio.sleep(self.look_s)
        return self.scenes[min(len(self.at), len(self.scenes)) - 1]

    async def take_in(self, records: Sequence[SocketRecord]) -> None:
        self.asked.append(list(records))


async def _takes_nothing(_: Sequence[SocketRecord]) -> None:
    return


def _now() -> float:
    return asyncio.get_running_loop().time()


def settle(script: Script, *steps: str, pause_s: float = 0.0) -> float:
    """Make these steps of a Settling, with a pause between them. Returns how long the last one took."""

    async def play() -> float:
        settling = Settling(script.look, script.take_in, BOUNDS, _now)
        began = _now()
        for number, step in enumerate(steps):
            await asyncio.sleep(pause_s if number else 0)
            began = _now()
            await getattr(settling, step)()
        return _now() - began

    return run(play())


# --- before packets are diverted


def test_where_nothing_waits_nothing_is_waited_for() -> None:
    assert settle(Script([]), "notice", "before_divert") == 0
    assert settle(Script([UNREAD, DATAGRAMS]), "before_divert") == 0, "that is for after the divert"


@pytest.mark.parametrize("unfinished", [CLOSED, HANDSHAKE, replace(CLOSED, state="LAST_ACK")])
def test_what_is_unfinished_is_waited_for_until_it_is_over(unfinished: SocketRecord) -> None:
    script = Script([], [unfinished], [unfinished], [unfinished], [])
    assert settle(script, "before_divert") == pytest.approx(3 * POLL_S)


def test_what_does_not_end_is_given_up_and_what_comes_later_is_not_waited_for() -> None:
    assert settle(Script([CLOSED]), "before_divert") == pytest.approx(BOUNDS.close_s, abs=2 * POLL_S)
    script = Script([], [CLOSED], [CLOSED_LATER])
    assert settle(script, "before_divert") == pytest.approx(POLL_S)


def test_the_time_of_copying_counts() -> None:
    script = Script([CLOSED])
    assert settle(script, "notice", "before_divert", pause_s=BOUNDS.close_s) == 0
    assert settle(script, "notice", "before_divert", pause_s=1.5) == pytest.approx(0.5, abs=2 * POLL_S)
    again = Script([CLOSED], [], [CLOSED], [])
    assert settle(again, "notice", "before_divert", pause_s=1.0) == pytest.approx(POLL_S)


def test_a_connection_that_the_service_has_not_closed_is_not_waited_for() -> None:
    assert settle(Script([replace(CLOSED, inode=9)]), "before_divert") == 0


def test_a_service_that_does_not_accept_is_found_out_before_the_divert() -> None:
    with pytest.raises(NotAccepting) as caught:
        settle(Script([LISTENER]), "before_divert")
    assert caught.value.message.startswith("2 connection(s) to 192.0.2.200:7000 wait to be accepted")


def test_a_queue_that_is_never_empty_and_gets_shorter_is_one_of_a_service_that_accepts() -> None:
    busy = [replace(LISTENER, receive_queue_bytes=length) for length in (5, 6, 5)]
    assert settle(Script(*([each] for each in busy)), "before_divert") == pytest.approx(2 * POLL_S)


def test_every_listener_has_to_accept() -> None:
    one_accepts = [[OTHER_LISTENER, replace(LISTENER, receive_queue_bytes=length)] for length in (5, 4, 3)]
    with pytest.raises(NotAccepting):
        settle(Script(*one_accepts), "before_divert")


# --- after packets are diverted


def test_settling_ends_when_the_queues_are_dry_and_what_was_on_its_way_is_here() -> None:
    assert settle(Script([]), "after_divert") == pytest.approx(QUIET_S)
    assert settle(Script([UNREAD], [UNREAD], []), "after_divert") == pytest.approx(QUIET_S + 2 * POLL_S)


@pytest.mark.parametrize("record", [UNREAD, DATAGRAMS])
def test_what_is_not_read_is_waited_for_within_the_bound(record: SocketRecord) -> None:
    assert settle(Script([record]), "after_divert") == pytest.approx(BOUNDS.settle_s, abs=1.5 * POLL_S)


def test_accepting_has_a_bound_of_its_own() -> None:
    script = Script(*([LISTENER] for _ in range(100)), [])
    assert settle(script, "after_divert") == pytest.approx(QUIET_S + 100 * POLL_S)
    with pytest.raises(NotAccepting):
        settle(Script([LISTENER]), "after_divert")


def test_a_look_that_takes_longer_than_the_bound_is_made_once() -> None:
    script = Script([UNREAD], look_s=0.012)
    assert settle(script, "after_divert") == pytest.approx(QUIET_S + 0.012)
    assert len(script.at) == 1


def test_at_most_half_of_the_time_is_spent_looking() -> None:
    script = Script([LISTENER], [LISTENER], [], look_s=0.1)
    assert settle(script, "after_divert") == pytest.approx(QUIET_S + 5 * 0.1)


def test_what_is_not_finished_is_asked_for_at_the_destination_and_looked_at_again() -> None:
    script = Script([CLOSED, HANDSHAKE], [HANDSHAKE], [LISTENER], [])
    assert settle(script, "after_divert") == pytest.approx(QUIET_S + 3 * POLL_S)
    assert script.asked == [[CLOSED, HANDSHAKE], [HANDSHAKE]]


def test_where_everything_is_finished_nobody_is_asked() -> None:
    script = Script([UNREAD, LISTENER], [])
    settle(script, "after_divert")
    assert script.asked == []


def test_a_handshake_has_more_time_than_what_is_closed() -> None:
    assert settle(Script([HANDSHAKE]), "after_divert") == pytest.approx(HANDSHAKE_S, abs=1.5 * POLL_S)
    assert settle(Script([CLOSED]), "after_divert") == pytest.approx(BOUNDS.settle_s, abs=1.5 * POLL_S)


def test_what_was_given_up_before_the_divert_costs_nobody_time_after_it() -> None:
    """A client that is gone in the middle of its handshake, or that does not take its last bytes."""
    script = Script([CLOSED, HANDSHAKE])
    assert settle(script, "notice", "before_divert", "after_divert", pause_s=YOUNG_S) == pytest.approx(QUIET_S)


# --- what is lost


def told(records: Sequence[SocketRecord], *given_up: SocketRecord) -> list[str]:
    async def play() -> list[str]:
        settling = Settling(
            Script([], list(given_up), list(given_up), list(records)).look,
            _takes_nothing,
            replace(BOUNDS, close_s=POLL_S),
            _now,
        )
        await settling.before_divert()
        return await settling.losses()

    return run(play())


def test_nothing_is_lost_of_what_criu_dumps() -> None:
    assert losses([UNREAD, LISTENER, replace(CLOSED, inode=9)]) == []


def test_datagrams_in_the_queues() -> None:
    (sentence,) = losses([DATAGRAMS])
    assert sentence == (
        "datagrams that the service had received and not read are lost (1536 bytes of the kernel's memory): "
        "192.0.2.200:53"
    )


def test_last_words_that_were_given_up_are_lost_unless_they_were_acknowledged() -> None:
    (sentence,) = told([CLOSED], CLOSED)
    assert "1 connection(s)" in sentence
    assert "with 500 byte(s)" in sentence, "without the FIN"
    assert "192.0.2.200:7000 to 192.0.2.99:40001" in sentence
    assert told([replace(CLOSED, send_queue_bytes=1, unsent_bytes=0)], CLOSED) == [], "only the FIN"
    assert told([], CLOSED) == []


def test_of_last_words_that_came_later_only_what_was_not_sent() -> None:
    (sentence,) = told([CLOSED_LATER], CLOSED)
    assert "with 100 byte(s)" in sentence
    assert told([replace(CLOSED_LATER, unsent_bytes=0)], CLOSED) == []


def test_handshakes_and_a_long_list() -> None:
    many = [replace(HANDSHAKE, local="2001:db8::200", remote="2001:db8::99", remote_port=port) for port in range(5)]
    (sentence,) = losses(many)
    assert sentence.startswith("5 handshake(s)")
    assert sentence.endswith("[2001:db8::200]:7000 to [2001:db8::99]:2 and 2 more")
