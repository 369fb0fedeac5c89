"""The screen of the lab's real client: read as Xvfb writes it, written as a PNG."""

from __future__ import annotations

import struct
import zlib

from labs.real_client import png, screen

RED, GREEN, BLUE, GREY = b"\0\0\xff\0", b"\0\xff\0\0", b"\xff\0\0\0", b"\x88\x88\x88\0"


def test_a_screen_is_read_line_by_line() -> None:
    header = [0] * 25
    header[0], header[4], header[5], header[12], header[19] = 104, 2, 2, 12, 1  # lines are longer than their pixels
    dump = struct.pack(">25I", *header) + b"xvf\0" + bytes(12) + RED + GREEN + b"gap." + BLUE + GREY + b"gap."
    assert screen(dump) == (2, 2, b"\xff\0\0\0\xff\0\0\0\xff\x88\x88\x88")


def test_a_picture_is_whole() -> None:
    made = png(2, 2, b"\xff\0\0\0\xff\0\0\0\xff\x88\x88\x88")
    assert made.startswith(b"\x89PNG\r\n\x1a\n")
    parts, place = {}, 8
    while place < len(made):
        size, kind = struct.unpack_from(">I4s", made, place)
        data = made[place + 8 : place + 8 + size]
        assert struct.unpack_from(">I", made, place + 8 + size) == (zlib.crc32(kind + data),)
        parts[kind], place = data, place + 12 + size
    assert list(parts) == [b"IHDR", b"IDAT", b"IEND"]
    assert parts[b"IHDR"] == struct.pack(">2I5B", 2, 2, 8, 2, 0, 0, 0)
    first, second = b"\xf8\0\0\0\xf8\0", b"\0\0\xf8\x88\x88\x88"
    up = bytes((new - old) & 0xFF for new, old in zip(second, first, strict=True))
    assert zlib.decompress(parts[b"IDAT"]) == b"\2" + first + b"\2" + up
