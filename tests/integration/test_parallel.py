"""Two moves at once over the same hosts: neither takes from the other what it holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from labs import config, workloads
from labs.lab import Lab
from labs.machines import Host
from labs.workloads import Workload
from tests.integration.command import Livemove
from tests.integration.faults import held, until
from tests.integration.scene import Scene
from tests.integration.test_datagrams import Datagrams, answers_since

KNOWN = config.Workload("beside", "process", ("192.0.2.216/24",), pid_file="/run/beside.pid")
OF_IT = f'case "$CRIU_CONFIG_FILE" in /run/livemove/*-{KNOWN.name}-*) true ;; *) false ;; esac'


def test_one_that_ends_takes_nothing_from_one_that_holds_packets(lab: Lab, tmp_path: Path) -> None:
    """Datagrams, because they are not sent again. The move that holds them is in the middle of its freeze."""
    lab.add_workload(KNOWN)
    held_one = replace(Workload.of_lab(lab, KNOWN.name), program="datagram_server")
    patient = tmp_path / "livemove.toml"
    patient.write_text(f"{lab.config_path.read_text()}\n[policy]\nsettle_s = 2.0\n")
    beta = lab.host("beta")
    ended = Scene.start(lab, "counter")
    try:
        workloads.install(lab, held_one)
        workloads.start(lab, held_one, "alpha")
        command = ("migrate", "--to", "beta", "--json")
        with Datagrams(lab, held_one.listens_on) as clients:
            before = [client["answered"] for client in clients.seen()]
            with (
                held(beta, "criu", OF_IT) as hold,
                Livemove(lab, *command, KNOWN.name, config=patient) as first,
                Livemove(lab, *command, "counter") as second,
            ):
                hold.reached(first)
                until(lambda: second.process.poll() is not None or is_last_deed(beta, "gate"), "the gate's turn")
                hold.go()
                said = [each.finish() for each in (first, second)]
            assert [each.status for each in said] == [0, 0], [each.stderr for each in said]
            told = [each for one in said for each in one.report["warnings"] if "CAP_SYS_RESOURCE" not in each]
            assert told == []
            until(lambda: answers_since(before, clients) > 100, "answers")
            seen = clients.stop()["clients"]
        assert [{**client, "sent": client["answered"]} for client in seen] == seen, "none is lost"
        assert ended.host == "beta"
    finally:
        ended.close()
        workloads.stop(lab, held_one)


def is_last_deed(host: Host, name: str) -> bool:
    """Whether the destination half of the counter's move on this host has got so far with its cleaning up."""
    newest = 'cat "$(ls -t /var/lib/livemove/*-counter-*/destination.jsonl | head -1)" 2>/dev/null; true'
    lines = host.run(["sh", "-c", newest]).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    names = {each["number"]: each["name"] for each in records if each["kind"] == "deed"}
    undone = [names.pop(each["number"]) for each in records if each["kind"] == "undone"]
    return bool(undone) and [*names.values()][-1:] == [name]
