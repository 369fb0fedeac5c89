"""What differs from what was sent is found, page for page, whatever was compared before."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.agent.memory.base import PAGE_BYTES as P
from coordinator.agent.memory.runs import Spans, normalise
from coordinator.agent.memory.sent_digests import SentDigests

PAGES = 40  # two blocks and a half


def spans_of(pages: set[int]) -> Spans:
    return normalise((page * P, (page + 1) * P) for page in pages)


def pages_of(spans: Spans) -> set[int]:
    return {at // P for start, end in spans for at in range(start, end, P)}


class Object:
    """A file of so many pages, each of one byte's value."""

    def __init__(self) -> None:
        self.values = [0] * PAGES
        self.reads = 0

    def page(self, number: int) -> bytes:
        return bytes([self.values[number]]) * P

    def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        whole = b"".join(map(self.page, range(PAGES)))
        return whole[offset : offset + length]


NUMBERS = st.sets(st.integers(0, PAGES - 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=4))
def test_what_differs_is_what_was_written_since_it_was_sent(
    rounds: list[tuple[set[int], set[int], set[int]]],
) -> None:
    memory, digests, sent = Object(), SentDigests(), dict[int, int]()
    for version, (written, noted, asked) in enumerate(rounds, 1):
        for page in written:
            memory.values[page] = version
        for page in noted:
            digests.note(page * P, memory.page(page))
            sent[page] = memory.values[page]
        differing = {page for page in asked if sent.get(page) != memory.values[page]}
        assert pages_of(digests.differing(memory.read, spans_of(asked))) == differing


def test_several_pages_are_noted_at_once() -> None:
    memory, digests = Object(), SentDigests()
    digests.note(3 * P, memoryview(memory.read(3 * P, 5 * P)))
    everything = spans_of(set(range(PAGES)))
    assert pages_of(digests.differing(memory.read, everything)) == set(range(PAGES)) - set(range(3, 8))


def test_of_what_does_not_matter_nothing_is_read() -> None:
    memory = Object()
    assert SentDigests().differing(memory.read, []) == []
    assert memory.reads == 0


def test_who_is_stopped_reads_no_more() -> None:
    memory, digests = Object(), SentDigests()
    digests.note(0, memory.read(0, PAGES * P))
    digests.stop()
    everything = spans_of(set(range(PAGES)))
    memory.reads = 0
    assert digests.differing(memory.read, everything) == everything
    assert memory.reads == 0
