"""The schedule of announcements, and who claims an address in a frame."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netfix.announce import announcement_frames, probe_frames
from netfix.errors import KernelRefusedError, UsageError
from netfix.frames import FakeFramePort, announce, claimant

MAC = "02:00:00:00:00:01"
A, A6 = "192.0.2.10", "2001:db8::10"
B, B6 = "192.0.2.11", "2001:db8::11"


class Clock:
    """A sleep that takes no time, and knows what had been sent when it was called."""

    def __init__(self, port: FakeFramePort) -> None:
        self.port = port
        self.slept: list[tuple[float, int]] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append((seconds, len(self.port.sent)))


async def test_a_burst_at_once_then_repeats_for_a_second() -> None:
    port = FakeFramePort()
    clock = Clock(port)
    await announce(port, [b"one", b"two"], sleep=clock.sleep)
    assert clock.slept == [(0.25, 6), (0.25, 8), (0.25, 10), (0.25, 12)]
    assert port.sent == [b"one", b"two"] * 7


def test_a_burst_alone_never_waits() -> None:
    """It ends without giving control back: so it can lie in a freeze."""
    port = FakeFramePort()
    work = announce(port, [b"one"], burst=3, repeats=0)
    with pytest.raises(StopIteration):
        work.send(None)
    assert port.sent == [b"one"] * 3


async def test_repeats_alone_wait_first() -> None:
    port = FakeFramePort()
    clock = Clock(port)
    await announce(port, [b"one"], burst=0, repeats=2, interval_s=0.5, sleep=clock.sleep)
    assert clock.slept == [(0.5, 0), (0.5, 1)]


@pytest.mark.parametrize(("burst", "repeats", "interval_s"), [(-1, 0, 1), (17, 0, 1), (1, 61, 1), (1, 1, -1)])
async def test_announcements_are_bounded(burst: int, repeats: int, interval_s: float) -> None:
    with pytest.raises(UsageError):
        await announce(FakeFramePort(), [b"one"], burst=burst, repeats=repeats, interval_s=interval_s)


async def test_the_fake_fails_when_told() -> None:
    port = FakeFramePort({A: {MAC}})
    port.fail_next = KernelRefusedError("no")
    with pytest.raises(KernelRefusedError):
        await port.who([b"probe"], A, 1)
    assert await port.who([b"probe"], A, 1) == {MAC}
    assert port.sent == [b"probe"]


@pytest.mark.parametrize("address", [A, A6])
def test_an_announcement_claims_its_address_only(address: str) -> None:
    for frame in announcement_frames(address, MAC):
        assert claimant(frame, address) == MAC
        assert claimant(frame, B) is None
        assert claimant(frame, B6) is None


@pytest.mark.parametrize("address", [A, A6])
def test_a_probe_claims_nothing(address: str) -> None:
    for frame in probe_frames(address, MAC):
        assert claimant(frame, address) is None


def test_an_advertisement_without_option_is_its_senders() -> None:
    (frame,) = announcement_frames(A6, MAC)
    assert claimant(frame[:78], A6) == MAC


def test_an_advertisement_from_beyond_the_segment_is_not_believed() -> None:
    """RFC 4861 section 7.1.2: hop limit 255, or it was forwarded."""
    (frame,) = announcement_frames(A6, MAC)
    assert claimant(frame[:21] + b"\x40" + frame[22:], A6) is None


@given(st.binary(max_size=120), st.sampled_from([b"\x08\x06", b"\x86\xdd"]))
def test_no_frame_is_too_strange(rest: bytes, ethertype: bytes) -> None:
    for address in (A, A6):
        claimant(rest, address)
        claimant(bytes(12) + ethertype + rest, address)
