"""The network protocol of the DarkPlaces engine (Nexuiz, Xonotic), as far as a scripted player needs it. Does no I/O.

Sources: the engine's netconn.c (packets), protocol.h and sv_send.c (what the server says), cl_input.c and sv_user.c
(what a client says). Packet headers are big endian, what is in them is little endian. The protocol is DP7, which the
engine's servers speak unless they are told otherwise.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

OUT_OF_BAND = b"\xff\xff\xff\xff"
"""How a packet without a connection begins: a question, an answer, the way to a connection."""

LENGTH_MASK, DATA, ACK, END, UNRELIABLE = 0xFFFF, 1 << 16, 1 << 17, 1 << 19, 1 << 20
HEADER = struct.Struct(">II")
FRAGMENT_BYTES = 1024
"""MAX_PACKETFRAGMENT: a reliable message that is longer goes in several packets."""

RESEND_AFTER_S = 1.0

DISCONNECT, TIME, CLIENT_DATA, SIGNON = 2, 7, 15, 25
ENTITIES = b"\x39"
STATS = {b"\x03": 6, b"\x33": 3}
"""What the server says: svc_ in protocol.h. Stats: a number, and a long or a byte; with the whole length of each."""

MOVE, STRING_COMMAND, ACKNOWLEDGE_FRAME = 3, 4, 50
"""What a client says: clc_ in protocol.h."""

BUTTON_ATTACK, BUTTON_JUMP = 1, 2
_MOVE = struct.Struct("<BIf3H3hIB2h6fH")
_ENTITIES = struct.Struct("<II")


class ProtocolError(Exception):
    """A packet that the protocol does not have."""


class Channel:
    """One side of a connection (netchan): numbered packets, of which reliable ones are acknowledged and sent again."""

    def __init__(self) -> None:
        self.received = 0
        """Unreliable packets that came, each in its turn."""

        self.lost = 0
        """Numbers that were left out. A packet that comes after a later one is lost too: the engine passes it over."""

        self._to_send: list[bytes] = []
        self._unacknowledged = b""
        self._sent_at = 0.0
        self._send_number = self._receive_number = 0
        self._unreliable_send_number = self._unreliable_receive_number = 0
        self._fragments = b""

    def receive(self, packet: bytes, now: float) -> tuple[bytes | None, list[bytes]]:
        """Take a packet: the message that is now whole, if any, and the packets to send in return."""
        flags, number, body = _opened(packet)
        if flags & UNRELIABLE:
            return self._receive_unreliable(number, body), []
        if flags & ACK:
            if self._unacknowledged and number == self._send_number - 1:
                self._unacknowledged = b""
            return None, self.due(now)
        if not flags & DATA:
            raise ProtocolError(f"a packet with the flags {flags:#x}")
        message = None
        if number == self._receive_number:
            self._receive_number += 1
            self._fragments += body
            if flags & END:
                message, self._fragments = self._fragments, b""
        return message, [HEADER.pack(ACK | HEADER.size, number)]

    def _receive_unreliable(self, number: int, body: bytes) -> bytes | None:
        if number < self._unreliable_receive_number:
            return None
        self.lost += number - self._unreliable_receive_number
        self._unreliable_receive_number = number + 1
        self.received += 1
        return body

    def send_reliable(self, message: bytes) -> None:
        """Queue a message; `due` has the packet as soon as it is its turn."""
        if len(message) > FRAGMENT_BYTES:
            raise ValueError(f"a message of {len(message)} bytes; a scripted player has none longer than a fragment")
        self._to_send.append(message)

    def due(self, now: float) -> list[bytes]:
        """The reliable packet to send now: the next, or the last once more if it was not acknowledged in time."""
        if self._unacknowledged:
            if now - self._sent_at < RESEND_AFTER_S:
                return []
        elif self._to_send:
            message = self._to_send.pop(0)
            head = HEADER.pack(DATA | END | HEADER.size + len(message), self._send_number)
            self._unacknowledged = head + message
            self._send_number += 1
        else:
            return []
        self._sent_at = now
        return [self._unacknowledged]

    def unreliable(self, message: bytes) -> bytes:
        """The packet with a message that is sent once."""
        head = HEADER.pack(UNRELIABLE | HEADER.size + len(message), self._unreliable_send_number)
        self._unreliable_send_number += 1
        return head + message


def _opened(packet: bytes) -> tuple[int, int, bytes]:
    if len(packet) < HEADER.size:
        raise ProtocolError(f"a packet of {len(packet)} bytes")
    flags, number = HEADER.unpack_from(packet)
    if flags & LENGTH_MASK != len(packet):
        raise ProtocolError(f"a packet of {len(packet)} bytes that says {flags & LENGTH_MASK}")
    return flags & ~LENGTH_MASK, number, packet[HEADER.size :]


@dataclass(frozen=True)
class Snapshot:
    """What the server told a player of one of its frames. `frame` and `move` are missing where effects come before the
    entities, which we do not read: they are what is acknowledged, and which of our moves the server had."""

    time: float
    frame: int | None = None
    move: int | None = None


def snapshot(message: bytes) -> Snapshot | None:
    """The head of a snapshot (SV_SendClientDatagram); None for another message."""
    if not message or message[0] != TIME:
        return None
    try:
        (time,) = struct.unpack_from("<f", message, 1)
        place = _after_client_data(message, 5)
        while message[place : place + 1] in STATS:
            place += STATS[message[place : place + 1]]
        if message[place : place + 1] != ENTITIES:
            return Snapshot(time)
        return Snapshot(time, *_ENTITIES.unpack_from(message, place + 1))
    except (struct.error, IndexError):
        raise ProtocolError(f"a snapshot that ends early: {message.hex()}") from None


def _after_client_data(message: bytes, place: int) -> int:
    """Where the player's own data end (SV_WriteClientdataToMessage): bits, and a field for each that is set."""
    if message[place] != CLIENT_DATA:
        return place
    (bits,) = struct.unpack_from("<H", message, place + 1)
    place += 3
    for extension, shift in ((1 << 15, 16), (1 << 23, 24)):
        if bits & extension:
            bits |= message[place] << shift
            place += 1
    sizes = {0: 1, 1: 1, 9: 4}  # view height, ideal pitch, items
    for axis in range(3):
        sizes |= {2 + axis: 2, 16 + axis: 4, 5 + axis: 4}  # punch angle, punch vector, velocity
    return place + sum(size for bit, size in sizes.items() if bits >> bit & 1)


def reaches(message: bytes, stage: int) -> bool:
    """Whether a reliable message tells that stage of signing on (1 to 3). We don't read what else may be in it; should
    other bytes look like it, our answer comes early, which a server does not mind."""
    return bytes([SIGNON, stage]) in message


def is_new_level(message: bytes) -> bool:
    """Whether a reliable message tells the clients to sign on once more, as on a change of level (SV_SpawnServer)."""
    return b"\x09reconnect\n\0" in message


def signon_answer(stage: int, name: str) -> list[bytes]:
    """What a client says when it is told that stage (CL_SignonReply)."""
    commands = {1: [f'name "{name}"', "rate 100000", "prespawn"], 2: ["spawn"], 3: ["begin"]}
    return [string_command(each) for each in commands[stage]]


def string_command(text: str) -> bytes:
    return bytes([STRING_COMMAND]) + text.encode() + b"\0"


def challenge(packet: bytes) -> str | None:
    """The challenge in a server's answer to `getchallenge`."""
    head = OUT_OF_BAND + b"challenge "
    return packet.removeprefix(head).partition(b"\0")[0].decode() if packet.startswith(head) else None


def connect(challenge: str) -> bytes:
    """Ask for a connection."""
    return OUT_OF_BAND + f"connect\\protocol\\darkplaces 3\\protocols\\DP7\\challenge\\{challenge}".encode()


def move(number: int, server_time: float, yaw: float, forward: int, buttons: int) -> bytes:
    """A player's input; `yaw` in degrees, `forward` in units a second (CL_ClientMovement_Input, SV_ReadClientMove)."""
    angle = math.floor(yaw * 65536 / 360) & 0xFFFF
    nowhere = (0.0,) * 6
    return _MOVE.pack(MOVE, number, server_time, 0, angle, 0, forward, 0, 0, buttons, 0, 0, 0, *nowhere, 0)


def acknowledge(frame: int) -> bytes:
    """Say that a snapshot has come, so that later ones need not repeat it."""
    return struct.pack("<BI", ACKNOWLEDGE_FRAME, frame)
