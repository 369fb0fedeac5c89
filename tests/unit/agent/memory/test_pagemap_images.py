"""The lazy pages of CRIU's page maps, in both versions of the format."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from coordinator.agent.memory.base import PAGE_BYTES
from coordinator.agent.memory.pagemap_images import (
    HEAD_BYTES,
    LAZY,
    PRESENT,
    Entry,
    lazy_pages,
    pages_image,
    parse,
    process_of,
)
from coordinator.errors import RestoreFailed
from tests.unit.agent.memory.pagemaps import MAGICS, serialize

ENTRIES = [Entry(PAGE_BYTES, 3, PRESENT), Entry(9 * PAGE_BYTES, 700, LAZY), Entry(1 << 46, 2, LAZY)]


@pytest.mark.parametrize("wide", [True, False])
def test_a_page_map_is_read(*, wide: bool) -> None:
    assert parse(serialize(8, ENTRIES, wide=wide), "pagemap-1.img") == (8, ENTRIES)


def test_only_what_processes_leave_to_be_filled_in_is_lazy(tmp_path: Path) -> None:
    (tmp_path / "pagemap-7.img").write_bytes(serialize(1, ENTRIES))
    (tmp_path / "pagemap-8.img").write_bytes(serialize(2, ENTRIES[:1]))
    (tmp_path / "pagemap-shmem-99.img").write_bytes(serialize(3, ENTRIES))
    assert lazy_pages(tmp_path) == {7: ENTRIES[1:], 8: []}


def test_what_it_does_not_know_is_refused() -> None:
    with pytest.raises(RestoreFailed, match=r"pagemap-1.img is no page map"):
        parse(b"something", "pagemap-1.img")
    with pytest.raises(RestoreFailed, match=r"pagemap-1.img is empty"):
        parse(MAGICS, "pagemap-1.img")
    with pytest.raises(RestoreFailed, match="wire type 2"):
        parse(MAGICS + struct.pack("=I", 1) + b"\x0a", "pagemap-1.img")


@pytest.mark.parametrize("number", [1, 300, (1 << 32) - 1])
def test_the_head_names_the_pages_image(number: int) -> None:
    assert pages_image(serialize(number, ENTRIES)[:HEAD_BYTES]) == f"pages-{number}.img"
    assert pages_image(serialize(number, [])) == f"pages-{number}.img"


@pytest.mark.parametrize("head", [b"", MAGICS, MAGICS + b"\x02\0", MAGICS + b"\x02\0\0\0", b"x" * HEAD_BYTES])
def test_a_head_that_is_not_known_names_none(head: bytes) -> None:
    assert pages_image(head) is None


def test_only_page_maps_of_processes_have_a_process() -> None:
    assert process_of("pagemap-17.img") == 17
    assert {process_of(name) for name in ("pagemap-shmem-17.img", "pagemap-.img", "pages-17.img", "pagemap-17")} == {
        None
    }
