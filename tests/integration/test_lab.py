"""The lab keeps its promises: real hosts on a segment of their own, nothing outside it, nothing left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP
from scapy.utils import rdpcap

from labs import config
from labs.commands import LabError, run
from labs.lab import Lab, exists, find
from labs.machines import Host
from labs.state import LABS, Paths, start_time

COMMAND = Path(__file__).parents[2] / "labs" / "lab"


def labs_command(lab: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run([str(COMMAND), "--name", lab, *arguments], check=False)


def init_pids(lab: Lab) -> list[int]:
    return [machine.init_pid for machine in lab.machines.values() if isinstance(machine, Host)]


def test_a_second_up_changes_nothing(lab: Lab) -> None:
    again = labs_command(lab.name, "up")
    assert again.returncode == 0
    assert "up already" in again.stderr
    assert init_pids(Lab.attach(lab.name)) == init_pids(lab)


def test_a_command_runs_in_all_namespaces_of_its_host(lab: Lab) -> None:
    names = ("mnt", "pid", "net", "uts", "ipc", "cgroup")
    links = [f"/proc/self/ns/{name}" for name in names]
    seen = {
        name: tuple(lab.machine(name).run(["readlink", *links]).stdout.split()) for name in ("alpha", "beta", "gamma")
    }
    seen["here"] = tuple(str(Path(link).readlink()) for link in links)
    for namespaces in zip(*seen.values(), strict=True):
        assert len(set(namespaces)) == len(seen)
    assert lab.machine("beta").run(["hostname"]).stdout == "beta\n"
    assert lab.machine("beta").run(["cat", "/proc/1/comm"]).stdout == "tini\n"


def test_exec_passes_input_output_and_exit_status_on(lab: Lab) -> None:
    done = run(
        [str(COMMAND), "--name", lab.name, "exec", "alpha", "--", "sh", "-c", "cat; exit 7"],
        check=False,
        input="through",
    )
    assert (done.returncode, done.stdout) == (7, "through")


def test_an_unknown_machine_is_named_with_those_there_are(lab: Lab) -> None:
    done = labs_command(lab.name, "exec", "delta", "--", "true")
    assert done.returncode == 1
    assert "'delta'" in done.stderr
    assert "alpha" in done.stderr


def test_ssh_logs_in_and_verifies_the_host_key(lab: Lab, tmp_path: Path) -> None:
    done = labs_command(lab.name, "ssh", "beta", "--", "echo", "$HOME", "a  b")
    assert (done.returncode, done.stdout) == (0, "$HOME a  b\n")

    alpha = lab.host("alpha")
    others = [line for line in lab.paths.known_hosts.read_text().splitlines() if line.startswith("beta,")]
    impostor = tmp_path / "known_hosts"
    impostor.write_text("\n".join(others).replace("beta,192.0.2.12", f"alpha,{alpha.address}") + "\n")
    wrong = [argument.replace(str(lab.paths.known_hosts), str(impostor)) for argument in alpha.ssh_command(["true"])]
    refused = lab.machine("operator").run(wrong, check=False)
    assert refused.returncode == 255
    assert "Host key verification failed" in refused.stderr


@pytest.mark.parametrize("source", ["alpha", "clients", "operator"])
def test_machines_reach_each_other(lab: Lab, source: str) -> None:
    program = "import socket, sys; [socket.create_connection((to, 22), 5).close() for to in sys.argv[1:]]"
    hosts = [lab.machine(name) for name in ("alpha", "beta", "gamma")]
    lab.machine(source).run(
        ["python3", "-c", program, *(host.address for host in hosts), *(host.address6 for host in hosts)]
    )


def own_network() -> list[str]:
    """The interfaces, addresses and routes of this machine. (Its own addresses may well be the lab's, too.)"""
    questions = (["-br", "link"], ["-br", "address"], ["route"], ["-6", "route"])
    return [run(["ip", *question]).stdout for question in questions]


def test_this_machine_sees_nothing_of_a_lab(other_lab_name: str) -> None:
    before = own_network()
    lab = Lab.up(other_lab_name)
    assert own_network() == before
    mounts = Path("/proc/self/mountinfo").read_text()
    assert str(lab.paths.directory / "netns") in mounts
    assert str(lab.paths.directory / "hosts") not in mounts


def test_files_are_put_on_a_host_and_read_back(lab: Lab) -> None:
    alpha = lab.host("alpha")
    alpha.write_file("/srv/new/hello.sh", "echo hello\n", 0o755)
    assert alpha.read_file("/srv/new/hello.sh") == "echo hello\n"
    assert alpha.run(["/bin/sh", "-c", "stat -c %a /srv/new/hello.sh; ls /srv/new"]).stdout == "755\nhello.sh\n"
    with pytest.raises(LabError, match="on beta: exit status 1"):
        lab.host("beta").read_file("/srv/new/hello.sh")


def test_a_capture_has_every_frame_once(lab: Lab, tmp_path: Path) -> None:
    with lab.capture(tmp_path / "ping.pcap", "icmp") as capture:
        lab.machine("alpha").run(["ping", "-4", "-c3", "-i0.01", "beta"])
    assert capture.dropped == 0
    assert [frame[ICMP].type for frame in rdpcap(str(capture.path))] == [8, 0] * 3


def test_a_command_ends_with_the_process_that_was_started(lab: Lab) -> None:
    process = lab.machine("alpha").popen(["sleep", "1234"])
    time.sleep(0.2)
    process.terminate()
    process.wait(timeout=5)
    time.sleep(0.1)
    assert "1234" not in lab.machine("alpha").run(["ps", "-e", "-o", "args"]).stdout


def test_a_workload_is_registered_once(lab: Lab) -> None:
    extra = config.Workload("extra", "process", ("192.0.2.210/24",), pid_file="/run/extra.pid")
    lab.add_workload(extra)
    before = lab.config_path.read_text()
    lab.add_workload(extra)
    assert lab.config_path.read_text() == before
    with pytest.raises(LabError, match="something else"):
        lab.add_workload(config.Workload("extra", "process", (), pid_file="/run/other.pid"))


def test_down_leaves_nothing(other_lab_name: str) -> None:
    lab = Lab.up(other_lab_name)
    pids = init_pids(lab)
    left_running = lab.machine("clients").popen(["sleep", "1000"])
    lab.host("alpha").start_service(["sleep", "1000"])
    lab.host("beta").run(["mkdir", "/sys/fs/cgroup/container"])
    started = time.monotonic()
    lab.down()
    assert time.monotonic() - started < 5
    assert left_running.wait(timeout=5) == -signal.SIGKILL
    assert [start_time(pid) for pid in pids] == [None] * 3
    assert not exists(lab.paths)
    assert other_lab_name not in Path("/proc/self/mountinfo").read_text()
    assert other_lab_name not in (run(["ls", "/run/livemove-lab"], check=False).stdout if LABS.exists() else "")
    again = labs_command(other_lab_name, "down")
    assert (again.returncode, "was not up" in again.stderr) == (0, True)
    status = labs_command(other_lab_name, "status", "--json")
    assert (status.returncode, json.loads(status.stdout)["state"]) == (3, "down")


def test_a_broken_lab_is_built_anew(other_lab_name: str) -> None:
    lab = Lab.up(other_lab_name)
    os.kill(lab.host("gamma").init_pid, signal.SIGKILL)
    with pytest.raises(LabError, match="only in parts"):
        for _ in range(100):
            Lab.attach(other_lab_name)
            time.sleep(0.01)
    assert all(machine.is_up for machine in Lab.up(other_lab_name).machines.values())


def test_an_interrupted_up_takes_down_what_it_made(other_lab_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(paths: Paths) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(config, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Lab.up(other_lab_name)
    paths = Paths(other_lab_name)
    assert not exists(paths)
    assert find(paths) is None


@pytest.mark.parametrize("name", ["", "../etc", "Lab", "a" * 21])
def test_a_name_that_could_lead_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(LabError, match="lab name"):
        Paths(name)
