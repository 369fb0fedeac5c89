"""The pattern service's two halves, without sockets: every kind of damage shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from labs.programs.ballast import PAGE_BYTES, Ballast
from labs.programs.pattern import (
    ASK,
    HEADER,
    HELLO,
    RECORD_BYTES,
    STREAM,
    STREAM_BODY_BYTES,
    ClientHalf,
    ProtocolError,
    ServerHalf,
)

SEED = bytes(range(16))


def dropped(data: bytes, at: int) -> bytes:
    return data[:at] + data[at + 1 :]


def doubled(data: bytes, at: int) -> bytes:
    return data[: at + 1] + data[at:]


def swapped(data: bytes, at: int) -> bytes:
    """Exchange the byte with the next one that differs."""
    other = next(i for i in range(at + 1, len(data)) if data[i] != data[at])
    mixed = bytearray(data)
    mixed[at], mixed[other] = mixed[other], mixed[at]
    return bytes(mixed)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


Damage = Callable[[bytes, int], bytes]
DAMAGES: list[Damage] = [dropped, doubled, swapped, flipped]


class Conversation:
    """A client and a server, both ends in hand."""

    def __init__(self, mode: bytes) -> None:
        self.client = ClientHalf(mode, SEED, 10)
        self.server = ServerHalf()
        self.server.feed(self.client.hello())

    def answers(self, sent: bytes) -> bytes:
        answers = self.server.feed(sent)
        return answers if self.client.mode == ASK else answers + self.server.next_stream_frame()


@pytest.mark.parametrize("mode", [ASK, STREAM])
def test_an_undamaged_conversation_is_right(mode: bytes) -> None:
    talk = Conversation(mode)
    for _ in range(50):
        assert talk.client.check(talk.answers(talk.client.record())) == 0
    assert talk.client.frames == 50
    assert talk.client.unanswered == 0


@pytest.mark.parametrize("mode", [ASK, STREAM])
def test_pieces_of_any_size_make_no_difference(mode: bytes) -> None:
    talk = Conversation(mode)
    sent = b"".join(talk.client.record() for _ in range(7))
    answers = b"".join(talk.answers(sent[i : i + 5]) for i in range(0, len(sent), 5))
    assert sum(talk.client.check(answers[i : i + 3]) for i in range(0, len(answers), 3)) == 0
    assert talk.client.unanswered == 0


@pytest.mark.parametrize("mode", [ASK, STREAM])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("at", [0, 1, 7, 64, RECORD_BYTES - 2])
def test_damage_on_the_way_to_the_server_is_seen(mode: bytes, damage: Damage, at: int) -> None:
    talk = Conversation(mode)
    talk.client.check(talk.answers(talk.client.record()))
    wrong = talk.client.check(talk.answers(damage(talk.client.record(), at)))
    wrong = wrong or talk.client.check(talk.answers(talk.client.record()))
    assert wrong > 0


@pytest.mark.parametrize("mode", [ASK, STREAM])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("at", [0, 8, HEADER.size - 1, HEADER.size, HEADER.size + RECORD_BYTES - 20])
def test_damage_on_the_way_back_is_seen(mode: bytes, damage: Damage, at: int) -> None:
    talk = Conversation(mode)
    wrong = talk.client.check(damage(talk.answers(talk.client.record()), at))
    wrong = wrong or talk.client.check(talk.answers(talk.client.record()))
    assert wrong > 0


@pytest.mark.parametrize("mode", [ASK, STREAM])
def test_a_record_lost_or_doubled_as_a_whole_is_seen(mode: bytes) -> None:
    for copies in (0, 2):
        talk = Conversation(mode)
        talk.answers(talk.client.record() * copies)
        assert talk.client.check(talk.answers(talk.client.record())) > 0


@pytest.mark.parametrize("mode", [ASK, STREAM])
def test_a_server_that_went_back_in_time_is_seen(mode: bytes) -> None:
    """What a restore of old memory looks like: everything after some instant is forgotten."""
    talk, forgetful = Conversation(mode), Conversation(mode)
    for _ in range(3):
        talk.client.check(talk.answers(talk.client.record()))
    assert talk.client.check(forgetful.answers(talk.client.record())) > 0


def test_an_answer_nobody_asked_for_is_wrong() -> None:
    talk = Conversation(ASK)
    answer = talk.answers(talk.client.record())
    assert talk.client.check(answer) == 0
    assert talk.client.check(answer) > 0


def test_a_stream_frame_that_claims_bytes_never_sent_is_wrong() -> None:
    talk = Conversation(STREAM)
    talk.server.feed(bytes(RECORD_BYTES))
    assert talk.client.check(talk.server.next_stream_frame()) > 0


def test_a_client_knows_what_is_unanswered() -> None:
    talk = Conversation(ASK)
    records = [talk.client.record() for _ in range(3)]
    talk.client.check(talk.answers(records[0]))
    assert talk.client.unanswered == 2


def test_what_does_not_begin_with_a_hello_is_refused() -> None:
    with pytest.raises(ProtocolError, match="not a hello"):
        ServerHalf().feed(b"GET / HTTP/1.1\r\nHost: x\r\n"[: HELLO.size])


def test_frames_have_the_sizes_they_are_said_to_have() -> None:
    ask, stream = Conversation(ASK), Conversation(STREAM)
    assert len(ask.answers(ask.client.record())) == HEADER.size + RECORD_BYTES
    assert len(stream.answers(b"")) == HEADER.size + STREAM_BODY_BYTES


def test_ballast_is_right_however_often_it_is_rewritten() -> None:
    ballast = Ballast(10 * PAGE_BYTES)
    for _ in range(5):
        ballast.dirty(7)
        assert ballast.check_all() == 0


def test_a_page_that_changed_behind_its_back_is_counted_and_not_forgotten() -> None:
    ballast = Ballast(4 * PAGE_BYTES)
    ballast._memory[2 * PAGE_BYTES + 5] ^= 1
    assert ballast.check_all() == 1
    ballast.dirty(4)
    assert ballast.wrong_pages == 2
    assert ballast.check_all() == 2  # rewritten, so right by now, but it had been wrong


def test_a_page_of_an_earlier_round_is_wrong() -> None:
    ballast = Ballast(2 * PAGE_BYTES)
    old = bytes(ballast._memory[:PAGE_BYTES])
    ballast.dirty(2)
    ballast._memory[:PAGE_BYTES] = old
    assert ballast.check_all() == 1


def test_no_ballast_is_no_trouble() -> None:
    ballast = Ballast(0)
    ballast.dirty(3)
    assert ballast.check_all() == 0
