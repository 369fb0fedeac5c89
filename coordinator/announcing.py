"""The frames of ``netfix.announce``, made when they are wanted.

Its library, scapy, takes half a second to import. Commands that need no frames do without; those that do import it in a
thread, while they connect to the hosts.
"""

from __future__ import annotations

import importlib
import threading
from typing import Any

_MODULE = "netfix.announce"


def import_meanwhile() -> None:
    """Begin to import it. Who makes a frame before that is done waits for it."""
    threading.Thread(target=importlib.import_module, args=(_MODULE,), daemon=True, name="import-scapy").start()


def announcement_frames(address: str, mac: str) -> tuple[bytes, ...]:
    """``netfix.announce.announcement_frames``."""
    return _made("announcement_frames", address, mac)


def probe_frames(address: str, mac: str) -> tuple[bytes, ...]:
    """``netfix.announce.probe_frames``."""
    return _made("probe_frames", address, mac)


def _made(name: str, address: str, mac: str) -> tuple[bytes, ...]:
    module: Any = importlib.import_module(_MODULE)
    frames: tuple[bytes, ...] = getattr(module, name)(address, mac)
    return frames
