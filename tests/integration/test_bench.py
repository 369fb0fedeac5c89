"""labs/bench in miniature: the shape of what it prints, nothing lost or wrong, nothing left. No times: they depend."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
from pathlib import Path
from typing import Any

from labs.benchmarks import measure, pcap
from labs.commands import run
from labs.lab import exists
from labs.state import Paths
from tests.integration.command import INTERRUPTIBLE

COMMAND = Path(__file__).parents[2] / "labs" / "bench"

MEASURED = {
    "longest_gap_ms",
    "freeze_ms",
    "total_ms",
    "bytes_sent",
    "wrong_bytes",
    "p99_before_ms",
    "p99_copying_ms",
    "cpu_s",
}
CASE = {"connections", "lock", "freeze_ms", "longest_gap_ms", "retransmissions", "lost", "wrong_bytes"}
HOP = {
    "freeze_ms",
    "longest_gap_ms",
    "retransmissions",
    "rst",
    "icmp_unreachable",
    "refused",
    "slowest_connect_ms",
}


def bench(lab: str, *options: str) -> Any:
    done = run([str(COMMAND), *options, "--name", lab, "--json"], timeout=300)
    assert not exists(Paths(lab))
    return json.loads(done.stdout)


def test_memory_measures_both_ways_to_move_and_finds_no_wrong_byte(other_lab_name: str) -> None:
    (case,) = bench(other_lab_name, "memory", "--sizes", "16", "--runs", "1")["cases"]
    assert (case["memory_mb"], case["dirty_mb_s"]) == (16, 10)
    assert case["mode"] in {"stop-copy", "pre-copy", "post-copy", "hybrid"}
    assert case["gap_ratio"] > 0
    assert {"CRIU dumps", "images sent"} < case["freeze_parts"]["source"].keys()
    assert {"CRIU restores", "tasks run"} < case["freeze_parts"]["destination"].keys()
    for kind in ("livemove", "plain"):
        seen = case[kind]
        assert seen.keys() >= MEASURED
        assert (seen["runs"], seen["lost"], seen["wrong_bytes"]) == (1, 0, 0)
        assert seen["longest_gap_ms"] > 0
        assert seen["bytes_sent"] > 16 << 20
        assert seen["cpu_s"] > 0


def test_gap_there_and_back_with_nobody_sent_away(other_lab_name: str) -> None:
    hops = bench(other_lab_name, "gap", "--hops", "2")["hops"]
    assert [hop["source"] for hop in hops] == ["alpha", "beta"]
    for hop in hops:
        assert hop.keys() >= HOP
        rejected = (hop["rst"], hop["refused"], hop["icmp_unreachable"])
        assert (hop["lost"], hop["wrong_bytes"], rejected) == (0, 0, (0, 0, 0))
        assert hop["connects"] > 0


def test_connections_under_each_lock(other_lab_name: str) -> None:
    cases = bench(other_lab_name, "connections", "--counts", "10")["cases"]
    assert [case["lock"] for case in cases] == ["livemove", "iptables", "nftables"]
    assert {"CRIU dumps", "images sent"} < cases[0]["freeze_parts"]["source"].keys()
    for case in cases:
        assert case.keys() >= CASE
        assert (case["connections"], case["lost"], case["wrong_bytes"]) == (10, 0, 0)
        assert (case["checked_before"], case["checked_after"]) == (10, 10)


def test_files_are_counted_out_of_the_freeze(other_lab_name: str) -> None:
    (case,) = bench(other_lab_name, "files", "--counts", "10", "--runs", "1")["cases"]
    assert (case["files"], case["runs"]) == (10, 1)
    assert 0 < case["files_ms"] < case["freeze_ms"] < case["total_ms"]


def test_an_interrupted_benchmark_leaves_nothing(other_lab_name: str) -> None:
    argv = [*INTERRUPTIBLE, str(COMMAND), "gap", "--name", other_lab_name]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stderr is not None
        for line in process.stderr:
            if "Hop 1" in line:
                process.send_signal(signal.SIGINT)
                break
        process.stderr.read()
        assert process.wait(60) == 130
    assert not exists(Paths(other_lab_name))


def test_the_longest_gap_is_where_nobody_answered() -> None:
    gap = measure.longest_gap(1.0, [1.1, 1.2, 1.7, 1.8])
    assert (gap.start, gap.end, gap.ms) == (1.2, 1.7, 500.0)


def test_copying_is_placed_on_the_clients_clock_by_the_freeze() -> None:
    phases = [{"name": "COPYING", "start_ms": 100, "ms": 300}, {"name": "FROZEN", "start_ms": 450, "ms": 20}]
    result = {"phases": phases, "bytes": {"pre_copy": 1, "frozen": 1}}
    window = measure.copying(result, measure.Gap(10.0, 10.1))
    assert window is not None
    assert [round(when, 6) for when in window] == [9.65, 9.95]
    assert measure.copying(result | {"bytes": {"pre_copy": 0, "frozen": 1}}, measure.Gap(10.0, 10.1)) is None


def test_a_capture_is_searched_for_resets_and_unreachable(tmp_path: Path) -> None:
    def frame(protocol: int, payload: bytes, source: bytes = bytes([192, 0, 2, 200])) -> bytes:
        ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0, source, bytes(4))
        return bytes(12) + b"\x08\x00" + ip + payload

    segment = bytearray(20)
    segment[13] = 0x14
    data = [
        frame(6, bytes(segment)),
        frame(6, bytes(20)),
        frame(6, bytes(segment), bytes(4)),
        frame(1, b"\x03\x03" + bytes(6)),
        frame(1, b"\x08\x00" + bytes(6)),
    ]
    capture = tmp_path / "a.pcap"
    records = b"".join(struct.pack("<IIII", 0, 0, len(each), len(each)) + each for each in data)
    capture.write_bytes(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1) + records)
    assert pcap.rejections(capture, "192.0.2.200") == pcap.Rejections(rst=1, icmp_unreachable=1)
