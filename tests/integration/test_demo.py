"""labs/demo as a newcomer runs it: both moves, every connection alive, nothing left."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

from labs.commands import run
from labs.lab import exists
from labs.state import Paths
from tests.integration.command import INTERRUPTIBLE

COMMAND = Path(__file__).parents[2] / "labs" / "demo"


def test_the_demo_moves_there_and_back_without_losing_anything(other_lab_name: str) -> None:
    done = run([str(COMMAND), "--name", other_lab_name, "--json"], timeout=120)
    hops = json.loads(done.stdout)["hops"]
    assert [(hop["source"], hop["destination"]) for hop in hops] == [("alpha", "beta"), ("beta", "alpha")]
    for hop in hops:
        assert (hop["outcome"], hop["exit_code"]) == ("moved", 0)
        seen = hop["clients"]
        assert (seen["connections"], seen["lost"], seen["resets"], seen["wrong_bytes"]) == (20, 0, 0, 0)
        assert {"longest_gap_ms", "retransmissions"} <= seen.keys()
    assert not exists(Paths(other_lab_name))


def test_an_interrupted_demo_leaves_nothing(other_lab_name: str) -> None:
    argv = [*INTERRUPTIBLE, str(COMMAND), "--name", other_lab_name]
    demo = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    with demo:
        assert demo.stderr is not None
        for line in demo.stderr:
            if "client connections" in line:
                demo.send_signal(signal.SIGINT)
                break
        demo.stderr.read()
        assert demo.wait(60) == 130
    assert not exists(Paths(other_lab_name))
