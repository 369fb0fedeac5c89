"""The game's protocol as the scripted players speak it: packets taken apart and made, and what counts as lost."""

from __future__ import annotations

import struct

import pytest

from labs.clients import darkplaces
from labs.clients.darkplaces import ACK, DATA, END, HEADER, UNRELIABLE, Channel, ProtocolError, Snapshot


def packet(flags: int, number: int, body: bytes = b"") -> bytes:
    return HEADER.pack(flags | HEADER.size + len(body), number) + body


def take(channel: Channel, *packets: bytes) -> list[bytes]:
    """The messages in these packets."""
    messages = [channel.receive(each, 0.0)[0] for each in packets]
    return [message for message in messages if message is not None]


def test_left_out_numbers_are_lost_snapshots() -> None:
    channel = Channel()
    assert take(channel, *(packet(UNRELIABLE, number, b"x") for number in (0, 1, 4, 5))) == [b"x"] * 4
    assert (channel.received, channel.lost) == (4, 2)


def test_what_comes_after_a_later_one_is_passed_over_and_lost() -> None:
    channel = Channel()
    assert take(channel, packet(UNRELIABLE, 1, b"new"), packet(UNRELIABLE, 0, b"old")) == [b"new"]
    assert (channel.received, channel.lost) == (1, 1)


def test_a_message_in_pieces_is_acknowledged_piece_by_piece_and_taken_once() -> None:
    channel = Channel()
    first, last = packet(DATA, 0, b"to"), packet(DATA | END, 1, b"gether")
    assert channel.receive(first, 0.0) == (None, [packet(ACK, 0)])
    assert channel.receive(first, 0.0) == (None, [packet(ACK, 0)])
    assert channel.receive(last, 0.0) == (b"together", [packet(ACK, 1)])
    assert channel.receive(last, 0.0) == (None, [packet(ACK, 1)])


def test_a_message_is_sent_again_until_it_is_acknowledged_and_then_the_next() -> None:
    channel = Channel()
    for message in (b"one", b"two"):
        channel.send_reliable(message)
    one, two = packet(DATA | END, 0, b"one"), packet(DATA | END, 1, b"two")
    assert channel.due(10.0) == [one]
    assert channel.due(10.9) == []
    assert channel.due(11.1) == [one]
    assert channel.receive(packet(ACK, 7), 11.2) == (None, [])
    assert channel.receive(packet(ACK, 0), 11.2) == (None, [two])
    assert channel.receive(packet(ACK, 0), 11.3) == (None, [])
    assert channel.receive(packet(ACK, 1), 11.3) == (None, [])
    assert channel.due(99.0) == []


def test_unreliable_messages_are_numbered() -> None:
    channel = Channel()
    assert [channel.unreliable(b"x") for _ in range(2)] == [packet(UNRELIABLE, number, b"x") for number in range(2)]


@pytest.mark.parametrize("broken", [b"", b"\x00\x10\x00", packet(UNRELIABLE, 0, b"xy")[:-1], packet(1 << 18, 0)])
def test_what_is_no_packet_is_told(broken: bytes) -> None:
    with pytest.raises(ProtocolError):
        Channel().receive(broken, 0.0)


TIME = b"\x07" + struct.pack("<f", 12.5)
ALL_CLIENT_DATA = (
    # view height, ideal pitch, three of: punch angle, punch vector, velocity; items; on ground, which has no data
    b"\x0f" + struct.pack("<HB", 0x86FF | 1 << 15, 0x07) + bytes(2) + 3 * bytes(2 + 4 + 4) + bytes(4)
)
STATS = b"\x03\x01" + bytes(4) + b"\x33\x02\x09"
ENTITIES = b"\x39" + struct.pack("<II", 70, 33) + b"\x00\x80"


@pytest.mark.parametrize("client_data", [b"\x0f\x00\x04", ALL_CLIENT_DATA])
def test_a_snapshot_says_its_time_its_frame_and_our_last_move(client_data: bytes) -> None:
    assert darkplaces.snapshot(TIME + client_data + ENTITIES) == Snapshot(12.5, 70, 33)
    assert darkplaces.snapshot(TIME + client_data + STATS + ENTITIES) == Snapshot(12.5, 70, 33)
    assert darkplaces.snapshot(TIME + client_data) == Snapshot(12.5)
    assert darkplaces.snapshot(TIME + client_data + b"\x06effects" + ENTITIES) == Snapshot(12.5)


def test_other_messages_are_no_snapshots() -> None:
    assert darkplaces.snapshot(b"\x01") is None
    assert darkplaces.snapshot(b"") is None
    with pytest.raises(ProtocolError):
        darkplaces.snapshot(TIME[:-1])


def test_signing_on() -> None:
    assert darkplaces.reaches(b"\x08welcome\0\x19\x01\x08a player came\0", 1)
    assert not darkplaces.reaches(b"\x08welcome\0\x19\x01", 2)
    assert darkplaces.signon_answer(3, "ann") == [b"\x04begin\0"]
    assert darkplaces.signon_answer(1, "ann")[0] == b'\x04name "ann"\0'
    assert darkplaces.is_new_level(b"\x08so long\0\x09reconnect\n\0")


def test_the_way_to_a_connection() -> None:
    assert darkplaces.challenge(b"\xff\xff\xff\xffchallenge a\\b\0vlen") == "a\\b"
    assert darkplaces.challenge(b"\xff\xff\xff\xffaccept") is None
    assert darkplaces.connect("xyz").startswith(b"\xff\xff\xff\xffconnect\\protocol\\darkplaces 3\\")


def test_a_move_has_the_fields_of_dp7() -> None:
    made = darkplaces.move(9, 1.5, yaw=-90, forward=-400, buttons=darkplaces.BUTTON_JUMP)
    kind, number, time, _, yaw, _, forward, _, _, buttons = struct.unpack_from("<BIfHHHhhhI", made)
    assert (kind, number, time, yaw, forward, buttons) == (3, 9, 1.5, 0xC000, -400, 2)
    assert len(made) == 1 + 4 + 4 + 6 + 6 + 4 + 1 + 30
