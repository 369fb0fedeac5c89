"""Sizes and numbers as in the kernel's headers (include/uapi/linux/{fs,userfaultfd}.h)."""

from __future__ import annotations

import ctypes
import struct

import pytest

from coordinator.agent.memory import pagemap, userfault
from coordinator.agent.memory.base import PAGE_BYTES
from coordinator.agent.memory.soft_dirty import Entries, parse_entries, populated

PAGE = PAGE_BYTES
PRESENT, SWAPPED, OF_FILE, ALONE, SOFT, GUARD = 1 << 63, 1 << 62, 1 << 61, 1 << 56, 1 << 55, 1 << 58


@pytest.mark.parametrize(
    ("structure", "size"),
    [
        (pagemap.PageRegion, 24),
        (pagemap.ScanArgument, 96),
        (userfault.Api, 24),
        (userfault.Register, 32),
        (userfault.WriteProtect, 24),
    ],
)
def test_sizes(structure: type[ctypes.Structure], size: int) -> None:
    assert ctypes.sizeof(structure) == size


def test_ioctl_numbers() -> None:
    assert pagemap.PAGEMAP_SCAN == 0xC0606610
    assert userfault.UFFDIO_API == 0xC018AA3F
    assert userfault.UFFDIO_REGISTER == 0xC020AA00
    assert userfault.UFFDIO_WRITEPROTECT == 0xC018AA06


def entries(*words: int) -> Entries:
    return parse_entries(struct.pack(f"<{len(words)}Q", *words), 10 * PAGE)


@pytest.mark.parametrize(
    ("word", "held", "dirty"),
    [
        (0, False, False),
        (PRESENT | ALONE | 5, True, False),
        (PRESENT | ALONE | SOFT, True, True),
        (SWAPPED, True, False),
        (SWAPPED | SOFT, True, True),
        (PRESENT, True, True),  # shared with others, or the zero page: it cannot be told
        (PRESENT | OF_FILE | ALONE | SOFT, False, False),  # a page of the file, not ours
        (SOFT, False, False),  # a new mapping without a page
        (SWAPPED | GUARD, False, False),
    ],
)
def test_what_an_entry_says(word: int, held: bool, dirty: bool) -> None:
    span = [(11 * PAGE, 12 * PAGE)]
    assert entries(0, word, 0) == Entries(span if held else [], span if dirty else [])


def test_entries_become_runs() -> None:
    clean, soft = PRESENT | ALONE, PRESENT | ALONE | SOFT
    assert entries(soft, soft, clean, 0, clean, soft) == Entries(
        [(10 * PAGE, 13 * PAGE), (14 * PAGE, 16 * PAGE)], [(10 * PAGE, 12 * PAGE), (15 * PAGE, 16 * PAGE)]
    )


def test_populated_mappings() -> None:
    smaps = (
        "1000-2000 rw-p 0 00:00 0\nRss:     4 kB\nSwap:   0 kB\n"
        "5000-6000 ---p 0 00:00 0\nRss:     0 kB\nSwap:   0 kB\n"
        "8000-9000 rw-p 0 00:00 0 [heap]\nRss:     0 kB\nSwap:   4 kB\n"
    )
    assert populated(smaps) == [(0x1000, 0x2000), (0x8000, 0x9000)]
