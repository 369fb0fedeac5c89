"""The packets of Teeworlds: made and taken apart, and those of a real server read."""

from __future__ import annotations

import pytest

from labs.clients import teeworlds_packets as packets
from labs.clients.teeworlds import Player
from labs.clients.teeworlds_packets import Packet, ProtocolError, chunk, number, numbers, opened

# What a server of 0.7.5 sent: two packets it compressed, and one that it did not.
READY_TO_ENTER = bytes.fromhex("100203455919264a42884a6e16ba3146a2849ebfe206")
SNAPSHOT = bytes.fromhex("100403455919263ddf4cc423272a4e45a614f24868e131cf1cebdb853fb001faf899ff153700")
EMPTY = bytes.fromhex("00040345591926000415b7341300013700040fb83402")
TOKEN = 0x45591926


def test_a_packet_that_a_server_compressed() -> None:
    packet = opened(READY_TO_ENTER)
    assert (packet.flags, packet.acknowledged, packet.token) == (packets.COMPRESSED, 2, TOKEN)
    assert list(packets.chunks(packet)) == [(2, b"\x02\x00"), (3, b'"\x01\x00\x01\x00\x01\x08'), (4, b"\x0b")]


def test_snapshots_have_their_tick_first() -> None:
    messages = [message for data in (SNAPSHOT, EMPTY) for _, message in packets.chunks(opened(data))]
    heads = [[*numbers(message)][:3] for message in messages if message[0] >> 1 in (7, 8)]
    assert heads == [[8 << 1 | 1, 3382, 2], [7 << 1 | 1, 3384, 2]]


def test_the_code_has_a_word_for_every_byte_and_no_bits_to_spare() -> None:
    assert sorted(packets._WORDS.values()) == [-1, *range(256)]
    assert sum(2**-length for length, _ in packets._WORDS) == 1


def test_compressed_data_without_an_end() -> None:
    with pytest.raises(ProtocolError):
        packets.expanded(READY_TO_ENTER[7:-1])


@pytest.mark.parametrize("value", [0, 1, 63, 64, 8191, 8192, 2**31 - 1, -1, -64, -65, -(2**31)])
def test_numbers(value: int) -> None:
    assert list(numbers(number(value) + number(7))) == [value, 7]
    assert len(number(value)) == len(number(~value))


@pytest.mark.parametrize("sequence", [None, 0, 255, 256, 1023])
@pytest.mark.parametrize("size", [1, 63, 64, 1300])
def test_chunks_come_out_as_they_went_in(sequence: int | None, size: int) -> None:
    made = Packet(0, 1023, 2, TOKEN, chunk(b"x" * size, sequence) + chunk(b"last")).encoded()
    packet = opened(made)
    assert (packet.acknowledged, packet.token) == (1023, TOKEN)
    assert list(packets.chunks(packet)) == [(sequence, b"x" * size), (None, b"last")]


def test_who_asks_for_a_token_sends_much() -> None:
    asked = opened(packets.control(packets.TOKEN, packets.NO_TOKEN, 0x01020304))
    assert (asked.flags, asked.token, packets.token_in(asked)) == (packets.CONTROL, packets.NO_TOKEN, 0x01020304)
    assert len(asked.content) == 1 + 512


@pytest.mark.parametrize("broken", [b"", b"\0" * 6, Packet(0, 0, 2, TOKEN, b"\0\1x").encoded()])
def test_what_is_no_packet_is_told(broken: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(packets.chunks(opened(broken)))


def test_a_gap_between_vital_chunks_is_a_loss_and_a_repetition_none() -> None:
    player = Player("192.0.2.1", 1, 1)
    player._received = 1020
    for old in (1020, 1000, 600):
        player._expect_old(old)
    for later in (1022, 3):
        with pytest.raises(ConnectionError, match="is lost"):
            player._expect_old(later)
