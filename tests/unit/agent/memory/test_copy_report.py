"""What a result tells of the copying of memory."""

from __future__ import annotations

from coordinator.agent.memory.copy_report import CopyReport


def test_rounds_are_numbered_and_counted() -> None:
    report = CopyReport()
    report.add_round(8192, 1.23456)
    report.add_round(4096, 2.0)
    assert [(each.n, each.pages, each.bytes, each.ms) for each in report.rounds] == [
        (1, 2, 8192, 1.235),
        (2, 1, 4096, 2.0),
    ]
    assert report.pre_copy_bytes == 12288


def test_what_made_a_freeze_longer_is_said() -> None:
    assert CopyReport(unwatched_bytes=(8 << 20) - 1).remarks("") == ()
    refused, again = CopyReport(unwatched_bytes=300 << 20).remarks("no filter")
    assert "no filter" in refused
    assert again.startswith("300 MiB were sent a second time")
