"""What the mover of a segment says when the segment does not follow."""

from netfix.errors import KernelRefusedError
from netfix.frames import FakeFramePort
from netfix.movers.l2 import ROUNDS, Announcement, L2Mover
from netfix.neighbours import FakeNeighbourhood

A, MAC, ELSEWHERE = "192.0.2.10", "02:00:00:00:00:01", "02:00:00:00:00:77"
ROUTER = "192.0.2.1"
PEERS = [f"198.51.100.{number}" for number in range(1, 9)] + ["192.0.2.100"]


async def no_time(_: float) -> None:
    """The repeats follow at once."""


def mover(port: FakeFramePort) -> L2Mover:
    hops = FakeNeighbourhood(dict.fromkeys(PEERS[:8], ROUTER))
    return L2Mover("destination", port, [Announcement(A, MAC, (b"here",), (b"who",))], hops, sleep=no_time)


async def test_a_segment_that_follows_is_told_once_and_asked_once() -> None:
    port = FakeFramePort({A: {MAC}})
    assert await mover(port).released(PEERS) == ()
    assert port.sent.count(b"here") == 7
    assert port.sent.count(b"who") == 1


async def test_a_neighbour_that_does_not_acknowledge_is_named_and_told_again() -> None:
    port = FakeFramePort(deaf={ROUTER})
    (warning,) = await mover(port).released(PEERS)
    assert warning == (
        "the segment does not follow: 192.0.2.1 did not acknowledge that 192.0.2.10 has moved, and may still send to "
        "the old host"
    )
    assert port.sent.count(b"here") == 7 * ROUNDS


async def test_another_host_that_answers_is_named() -> None:
    (warning,) = await mover(FakeFramePort({A: {MAC, ELSEWHERE}})).released([])
    assert warning == f"{ELSEWHERE} answers for {A} as well: clients may go there"


async def test_of_many_neighbours_some_are_named() -> None:
    port = FakeFramePort(deaf={f"192.0.2.{number}" for number in range(1, 9)})
    plain = L2Mover("destination", port, [Announcement(A, MAC, (b"here",))], FakeNeighbourhood(), sleep=no_time)
    (warning,) = await plain.released([f"192.0.2.{number}" for number in range(1, 9)])
    assert "192.0.2.1, 192.0.2.2, 192.0.2.3 and 5 more did not acknowledge" in warning


async def test_a_segment_that_follows_late_is_no_warning() -> None:
    class Late(FakeFramePort):
        async def ask(self, questions: dict[str, bytes], address: str, timeout_s: float) -> set[str]:  # type: ignore[override]
            answered = await super().ask(questions, address, timeout_s)
            self.deaf.clear()
            return answered

    assert await mover(Late(deaf={ROUTER})).released(PEERS) == ()


async def test_a_repeat_that_fails_is_no_failure() -> None:
    port = FakeFramePort()
    made = mover(port)
    await made.divert()
    port.fail_next = KernelRefusedError("the interface went down")
    await made.finished()
    assert port.sent.count(b"here") == 3
