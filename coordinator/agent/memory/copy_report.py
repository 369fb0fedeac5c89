"""What the copying of memory has done so far, for the result (pure)."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.agent.memory.base import PAGE_BYTES
from coordinator.agent.memory.convergence import Decision
from coordinator.protocol import RoundResult

#: Less than 8 MiB takes but some milliseconds of the freeze.
_WORTH_A_REMARK = 8 << 20


@dataclass(slots=True)
class CopyReport:
    """Sizes are in bytes. ``decision`` is why the rounds ended; ``unwatched_bytes`` is what was sent again in the
    freeze because nothing told whether it had been written to."""

    rounds: list[RoundResult] = field(default_factory=list)
    pre_copy_bytes: int = 0
    last_bytes: int = 0
    unwatched_bytes: int = 0
    decision: Decision | None = None

    def add_round(self, sent: int, duration_ms: float) -> None:
        """A round of so many bytes is over."""
        number = len(self.rounds) + 1
        self.rounds.append(RoundResult(n=number, pages=sent // PAGE_BYTES, bytes=sent, ms=round(duration_ms, 3)))
        self.pre_copy_bytes += sent

    def remarks(self, refusal: str) -> tuple[str, ...]:
        """Why the freeze was longer than it had to be, a sentence for each reason. ``refusal``: why nothing could be
        kept out of CRIU's sight, or nothing."""
        sentences = []
        if refusal:
            sentences.append(f"CRIU had to look at every page, which made the freeze longer: {refusal}")
        if self.unwatched_bytes >= _WORTH_A_REMARK:
            sentences.append(
                f"{self.unwatched_bytes >> 20} MiB were sent a second time, in the freeze: directly before it the "
                "kernel had stopped to watch them, as it does when the service joins mappings with mremap"
            )
        return tuple(sentences)
