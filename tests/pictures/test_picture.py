"""A real client of the game, under a virtual display, goes on showing it through a move.

Not among the tests that `tests/run` runs by itself: it needs 1.5 GB of packages the first time. Run it with
`tests/run tests/pictures`. The pictures in docs/services were made so, by `labs/xonotic --picture`.
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

from labs.commands import run

COMMAND = Path(__file__).parents[2] / "labs" / "xonotic"
LAB = "pictures"
CONSOLE_BYTES = 60_000
"""A picture of the text that a client shows when it has no game is smaller: 20 to 40 kB."""


def pixels(path: Path) -> bytes:
    """The lines of a picture as they are stored."""
    data, place, packed = path.read_bytes(), 8, b""
    while place < len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        packed += data[place + 8 : place + 8 + size] if kind == b"IDAT" else b""
        place += 12 + size
    return zlib.decompress(packed)


def test_a_real_client_sees_the_game_before_and_after_a_move(tmp_path: Path) -> None:
    arguments = ["--name", LAB, "--players", "2", "--json", "--picture", str(tmp_path)]
    told = json.loads(run([str(COMMAND), *arguments], timeout=1500).stdout)
    assert "problems" not in told
    assert len(told["hops"]) == 3
    paths = [tmp_path / name for name in ("0-alpha.png", "1-beta.png", "2-gamma.png", "3-alpha.png")]
    assert all(path.stat().st_size > CONSOLE_BYTES for path in paths), "rooms are drawn"
    assert len({pixels(path) for path in paths}) == 4, "the game goes on"
