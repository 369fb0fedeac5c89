"""`labs/bench gap`: moves under two clients, one that asks all the time and one that keeps connecting anew."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from labs.benchmarks import pcap
from labs.benchmarks.measure import Row, longest_gap
from labs.benchmarks.session import Asker, Service, Settings, fresh_lab, move, other, settle

CONNECT_EVERY_MS = 5.0
BEFORE_S = 0.7
AFTER_S = 1.3
"""Before and after are two seconds between two hops: the client's TCP is over the last one."""


@dataclass(frozen=True)
class GapBench:
    """How many moves to make."""

    settings: Settings
    hops: int

    def run(self, hops: list[Row], problems: list[str]) -> None:
        """Fill in one row a hop, as they come. Stops at the first move that fails."""
        with fresh_lab(self.settings) as lab, tempfile.TemporaryDirectory(prefix="livemove-bench-") as directory:
            service = Service.started(lab)
            with service.asker(connect_every_ms=CONNECT_EVERY_MS) as asker:
                for number in range(1, self.hops + 1):
                    with self.settings.steps.step(f"Hop {number} of {self.hops}"):
                        hop = self._hop(service, asker, Path(directory, f"{number}.pcap"))
                    problems += [f"hop {number}: {trouble}" for trouble in hop.pop("troubles")]
                    hops.append(hop)
                    self.settings.steps.note(
                        f"freeze {hop['freeze_ms']:.1f} ms, longest gap {hop['longest_gap_ms']:.1f} ms"
                    )

    def _hop(self, service: Service, asker: Asker, capture: Path) -> Row:
        expression = pcap.EXPRESSION.format(address=service.address)
        with service.lab.capture(capture, expression) as recorded:
            asker.begin()
            settle(BEFORE_S)
            source = service.where()
            result = move(service, other(source))
            settle(AFTER_S)
            seen = asker.end()
        rejected = pcap.rejections(capture, service.address)
        troubles = list(seen["troubles"])
        if recorded.dropped:
            troubles.append(f"the capture lost {recorded.dropped} frames: its counts are too small")
        return {
            "source": source.name,
            "mode": result["mode"],
            "freeze_ms": result["freeze_ms"],
            "total_ms": result["total_ms"],
            "longest_gap_ms": longest_gap(seen["began"], seen["answered"]).ms,
            "retransmissions": seen["retransmissions"],
            "connect_retransmissions": seen["connect_retransmissions"],
            "rst": rejected.rst,
            "icmp_unreachable": rejected.icmp_unreachable,
            "connects": seen["connects"],
            "refused": seen["refused"],
            "slowest_connect_ms": seen["slowest_connect_ms"],
            "lost": seen["lost"],
            "wrong_bytes": seen["wrong_bytes"],
            "phases": result["phases"],
            "warnings": result["warnings"],
            "troubles": troubles,
        }
