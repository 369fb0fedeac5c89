"""A hold on a kernel that cannot hold. The rest: tests/contract/test_netfix_hold.py."""

import pytest

from netfix import hold as module
from netfix import nft
from netfix.gate import HOLDING, OPEN, FakeGate, holding, releasing
from netfix.hold import FakeHold, Hold, HoldReport, NfqueueHold


@pytest.mark.parametrize("kind", ["nfqueue", "fake"])
async def test_without_a_queue_the_same_calls_drop(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    async def none() -> str:
        return nft.NO_QUEUE

    monkeypatch.setattr(module, "hold_support", none)
    hold: Hold = NfqueueHold() if kind == "nfqueue" else FakeHold(kernel_lacks=True)
    gate = FakeGate("one", ["192.0.2.10"])
    await hold.open()
    await gate.set(holding(hold.queue))
    await gate.set(releasing(hold.queue))
    report = await hold.release(lambda: gate.set(OPEN))
    assert report == HoldReport(mode="none") == await hold.discard()
    assert gate.history == [HOLDING, OPEN, OPEN]
    hold.close()
