"""Containers of every runtime move, and afterwards the runtime itself agrees: on the destination, and on the source."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

from labs import config, groups, oci, podman, workloads
from labs.lab import Lab
from labs.machines import Host
from tests.integration import books
from tests.integration.command import livemove, migrate
from tests.integration.faults import failing_criu, kept_criu_log, until
from tests.integration.scene import CONNECTIONS, Scene

PACKAGES = "runtimes"
ADDRESSES = {"runc": "192.0.2.236/24", "crun": "192.0.2.237/24", "podman": "192.0.2.238/24"}
Runtime = Literal["runc", "crun", "podman"]
#: What stock of the household is when it is taken for the first time, and what of it counts the times.
COUNTING = ("asked", "piped", "terminal", "lingering", "deleted", "kept")
EVERYTHING = dict.fromkeys(COUNTING, 1) | {
    "threads": 4,
    "children": 2,
    "seccomp": 2,
    "no_new_privileges": 1,
    "files_limit": [1000, 1000],
    "read_only": True,
    "locked": True,
}
STATES = {"runc": "/run/runc/{}/state.json", "crun": "/run/crun/{}/status"}


def scene_of(lab: Lab, runtime: Runtime, program: str = "pattern_server") -> Scene:
    name = f"in-{runtime}"
    bundle = f"/srv/{name}" if runtime != "podman" else None
    lab.add_workload(config.Workload(name, runtime, (ADDRESSES[runtime],), container=name, bundle=bundle))
    return Scene.start(lab, name, memory_mb=8, dirty_mb_s=1, program=program)


@pytest.fixture
def scene(packaged_lab: Lab, request: pytest.FixtureRequest) -> Iterator[Scene]:
    made = scene_of(packaged_lab, request.param)
    yield made
    made.close()


every_runtime = pytest.mark.parametrize("scene", ADDRESSES, indirect=True)
bare_runtimes = pytest.mark.parametrize("scene", STATES, indirect=True)


def says(host: Host, scene: Scene) -> str:
    """What the runtime says of the container on a host; nothing, where it does not have it or has it at rest."""
    runtime, name = scene.workload.runtime, scene.workload.name
    if runtime == "podman":
        return host.run(["podman", "ps", "--filter", f"name={name}", "--format", "{{.State}}"]).stdout.strip()
    done = host.run([runtime, "state", name], check=False)
    return str(json.loads(done.stdout)["status"]) if done.returncode == 0 else ""


def agreed(scene: Scene) -> dict[str, str]:
    return {host: word for host in ("alpha", "beta", "gamma") if (word := says(scene.lab.host(host), scene))}


def stock(scene: Scene, host: str) -> dict[str, Any]:
    """What the service says of all that goes on in its container."""
    machine, data = scene.lab.host(host), f"{scene.workload.bundle}/data"
    machine.run(["sh", "-c", f"rm -f {data}/stock && touch {data}/ask"])
    until(lambda: machine.run(["test", "-e", f"{data}/stock"], check=False).returncode == 0, "stock was taken")
    taken: dict[str, Any] = json.loads(machine.read_file(f"{data}/stock"))
    return taken


@pytest.mark.parametrize("runtime", STATES)
def test_everything_in_a_container_goes_on(packaged_lab: Lab, runtime: Runtime) -> None:
    scene = scene_of(packaged_lab, runtime, "household")
    try:
        first = stock(scene, "alpha")
        assert first == EVERYTHING
        for asked, destination in enumerate(("beta", "alpha", "beta"), 2):
            scene.begin_hop()
            said = migrate(scene.lab, scene.workload.name, destination)
            assert said.status == 0, said.stdout + said.stderr
            scene.unharmed(destination)
            assert stock(scene, destination) == EVERYTHING | dict.fromkeys(COUNTING, asked)
    finally:
        scene.close()


#: Whose files are copied, and to which hosts; a container of runc is moved with its own in `test_files`.
COPIED = {
    "crun": (config.Workload("books-crun", "crun", ("192.0.2.239/24",), "books-crun", "/srv/books-crun"), ["beta"]),
    "podman": (config.Workload("books-podman", "podman", ("192.0.2.240/24",), "books-podman"), ["beta", "alpha"]),
    "process": (config.Workload("books", "process", ("192.0.2.241/24",), pid_file="/run/books.pid"), ["beta"]),
}


@pytest.mark.parametrize("runtime", COPIED)
def test_files_come_along(packaged_lab: Lab, tmp_path: Path, runtime: str) -> None:
    workload, destinations = COPIED[runtime]
    packaged_lab.add_workload(workload)
    scene = Scene.start(packaged_lab, workload.name, program="bookkeeper")
    volume = f'\n[[workloads.{workload.name}.volumes]]\npath = "{scene.workload.data}"\nfiles = "sync"\n'
    (tmp_path / "lab.toml").write_text(packaged_lab.config_path.read_text() + volume)
    try:
        books.move_along(scene, *destinations, config=tmp_path / "lab.toml")
    finally:
        scene.close()


def test_podman_in_a_network_namespace_that_the_operator_made(packaged_lab: Lab) -> None:
    addresses = ("192.0.2.243/24", "2001:db8::243/64")
    packaged_lab.add_workload(config.Workload("podveth", "podman", addresses, container="podveth", network="veth"))
    with packaged_lab.bridges():
        scene = Scene.start(packaged_lab, "podveth", network="veth")
        try:
            scene.begin_hop()
            with failing_criu(packaged_lab.host("beta"), "swrk"):
                said = migrate(packaged_lab, "podveth", "beta")
            assert said.status == 4, said.stdout + said.stderr
            scene.unharmed("alpha")
            for destination in ("beta", "alpha"):
                scene.begin_hop()
                said = migrate(packaged_lab, "podveth", destination)
                assert said.status == 0, said.stdout + said.stderr
                assert said.report["connections"] == {"established": CONNECTIONS, "restored": CONNECTIONS}
                scene.unharmed(destination)
                assert agreed(scene) == {destination: "running"}
        finally:
            scene.close()
            for host in ("alpha", "beta", "gamma"):
                workloads.uninstall(packaged_lab, scene.workload, host)


#: By controller: the file of cgroup v2, and what `oci.with_limits` has written there.
LIMITS = {"hugetlb": ("hugetlb.2MB.max", 8 << 20), "memory": ("memory.max", 1 << 30), "pids": ("pids.max", 500)}


@contextmanager
def controllers(lab: Lab) -> Iterator[list[str]]:
    """Those of `LIMITS` that this machine leaves to cgroup v2, handed down to the containers on two hosts."""
    top, group = groups.hierarchy(), groups.of_lab(lab.name)
    found = [each for each in (top / "cgroup.controllers").read_text().split() if each in LIMITS]
    with ExitStack() as undo:
        for folder in (top, group, group / "alpha", group / "beta"):
            control = folder / "cgroup.subtree_control"
            for each in set(found) - set(control.read_text().split()):
                control.write_text(f"+{each}")
                undo.callback(control.write_text, f"-{each}")
        yield found


@pytest.mark.parametrize("runtime", STATES)
def test_limits_of_the_control_group_hold_wherever_the_container_is(packaged_lab: Lab, runtime: Runtime) -> None:
    scene = scene_of(packaged_lab, runtime)
    scene.close()
    name, path = scene.workload.name, f"{scene.workload.bundle}/config.json"
    hosts = {host: packaged_lab.host(host) for host in ("alpha", "beta")}
    with controllers(packaged_lab) as known:
        wanted = dict(LIMITS[controller] for controller in known)
        assert wanted, f"this machine leaves none of {', '.join(LIMITS)} to cgroup v2"
        try:
            for host in hosts.values():
                host.write_file(path, json.dumps(oci.with_limits(json.loads(host.read_file(path)), known)))
            workloads.start(packaged_lab, scene.workload, "alpha")
            assert "LIMITS_CHANGED" not in livemove(packaged_lab, "check", name, "--to", "beta").stdout
            file, value = next(iter(wanted.items()))
            hosts["alpha"].run(["sh", "-c", f"echo {value // 2} >/sys/fs/cgroup/{name}/{file}"])
            said = livemove(packaged_lab, "check", name, "--to", "beta")
            assert said.status == 0
            assert f"{file} is {value // 2}, not {value}" in said.stdout
            for there, destination in (("alpha", "beta"), ("beta", "alpha")):
                assert migrate(packaged_lab, name, destination).status == 0
                group = f"/sys/fs/cgroup/{name}"
                assert {file: int(hosts[destination].read_file(f"{group}/{file}")) for file in wanted} == wanted
                assert hosts[there].run(["test", "-d", group], check=False).returncode == 1
        finally:
            workloads.stop(packaged_lab, scene.workload)


@pytest.mark.parametrize("runtime", STATES)
def test_what_cannot_be_moved_is_told(packaged_lab: Lab, runtime: Runtime) -> None:
    """A user namespace, standard output into a pipe, an error log on the host."""
    scene = scene_of(packaged_lab, runtime)
    alpha, name = scene.lab.host("alpha"), scene.workload.name
    try:
        alpha.run([runtime, "delete", "--force", name])
        told = oci.with_a_user_namespace(json.loads(alpha.read_file(f"{scene.workload.bundle}/config.json")))
        told["process"]["args"] = ["sleep", "1000"]
        alpha.write_file(f"{scene.workload.bundle}/config.json", json.dumps(told))
        start = f"{runtime} run --detach --bundle {scene.workload.bundle} {name} </dev/null 2>/run/log | cat"
        with alpha.popen(["sh", "-c", start]) as logger:
            until(lambda: says(alpha, scene) == "running", "the container runs")
            said = livemove(scene.lab, "check", name, "--to", "beta", "--json")
            alpha.run([runtime, "delete", "--force", name])
            logger.wait()
        found = {each["code"] for each in said.report["findings"]}
        assert {"USER_NAMESPACE", "EXTERNAL_PIPE", "FILE_OUTSIDE"} <= found
    finally:
        scene.close()


#: What podman is told of a container, and what livemove says of it then.
PODMANS = {
    "networks": (
        ["--network=podman", "--restart=always", "--volume=/mnt", "--tty"],
        {"OWN_NETWORK_NAMESPACE", "PODMAN_RESTARTS", "FILES_ELSEWHERE", "PODMAN_OPTION"},
    ),
    "pods": (
        ["--pod=odd-pod", "--rm", "--log-driver=passthrough", "--uidmap=0:0:65536"],
        {"IN_A_POD", "PODMAN_RESTARTS", "PODMAN_OPTION", "USER_NAMESPACE"},
    ),
}


@pytest.mark.parametrize("kind", PODMANS)
def test_what_podman_does_by_itself_is_told(packaged_lab: Lab, kind: str) -> None:
    options, expected = PODMANS[kind]
    workload = config.Workload("odd", "podman", ("192.0.2.242/24",), container="odd", files="sync")
    packaged_lab.add_workload(workload)
    hosts = [packaged_lab.host(name) for name in ("alpha", "beta")]
    silent = "exec sleep 1000 </dev/null >/dev/null 2>&1"
    try:
        for host in hosts:
            rootfs = podman.prepare(host, "odd")
            host.run(["podman", "pod", "create", "--infra=false", "--share=", "odd-pod"])
            named = ["--name=odd", "--read-only", *options, "--rootfs", rootfs]
            host.run(["podman", "create", *named, "sh", "-c", silent])
        hosts[0].run(["sh", "-c", "podman start odd </dev/null >/dev/null 2>&1"])
        said = livemove(packaged_lab, "check", "odd", "--to", "beta", "--json")
    finally:
        for host in hosts:
            podman.uninstall(host, workload)
            host.run(["podman", "pod", "rm", "--force", "--ignore", "odd-pod"])
            host.run(["nft", "destroy table inet netavark"])  # podman leaves it, when the last container has gone
    assert said.status == 3
    assert expected <= {each["code"] for each in said.report["findings"]}


@every_runtime
def test_the_runtime_agrees_wherever_it_is(scene: Scene) -> None:
    for destination, options in (("beta", ()), ("alpha", ("--mode", "stop-copy")), ("beta", ("--mode", "post-copy"))):
        scene.begin_hop()
        said = migrate(scene.lab, scene.workload.name, destination, *options)
        assert said.status == 0, said.stdout + said.stderr
        assert said.report["connections"] == {"established": CONNECTIONS, "restored": CONNECTIONS}
        scene.unharmed(destination)
        assert agreed(scene) == {destination: "running"}
    beta, runtime, name = scene.lab.host("beta"), scene.workload.runtime, scene.workload.name
    assert "pattern_server" in beta.run([runtime, "exec", name, "cat", "/proc/1/cmdline"]).stdout
    beta.run([runtime, *(["stop", "--time", "0", name] if runtime == "podman" else ["kill", name, "KILL"])])
    until(lambda: agreed(scene) != {"beta": "running"}, "a container that was killed does not run")
    assert workloads.where(scene.lab, scene.workload) == []


@every_runtime
def test_a_restore_that_fails_leaves_the_runtime_as_it_was(scene: Scene) -> None:
    scene.begin_hop()
    with failing_criu(scene.lab.host("beta"), "swrk"):
        said = migrate(scene.lab, scene.workload.name, "beta")
    assert said.status == 4, said.stdout + said.stderr
    scene.unharmed("alpha")
    assert agreed(scene) == {"alpha": "running"}
    assert migrate(scene.lab, scene.workload.name, "beta").status == 0
    scene.unharmed("beta")
    assert agreed(scene) == {"beta": "running"}


@bare_runtimes
def test_a_runtime_that_lost_its_state_file_is_told(scene: Scene) -> None:
    alpha, name = scene.lab.host("alpha"), scene.workload.name
    state = STATES[scene.workload.runtime].format(name)
    alpha.run(["mv", state, f"{state}.lost"])
    try:
        said = livemove(scene.lab, "check", name, "--to", "beta", "--json")
    finally:
        alpha.run(["mv", f"{state}.lost", state])
    assert said.status == 3
    assert {"RUNTIME_LOST_IT", "WORKLOAD_NOT_RUNNING"} <= {each["code"] for each in said.report["findings"]}
    scene.unharmed("alpha")


@every_runtime
def test_criu_logs_warnings_alone(scene: Scene) -> None:
    """A line for every step would be written in the freeze."""
    alpha, beta = scene.lab.host("alpha"), scene.lab.host("beta")
    with kept_criu_log(alpha) as dumped, kept_criu_log(beta) as restored:
        said = migrate(scene.lab, scene.workload.name, "beta")
        assert said.status == 0, said.stderr
        lines = [*alpha.read_file(dumped).splitlines(), *beta.read_file(restored).splitlines()]
    assert [line for line in lines if not line.startswith(("Warn ", "Error "))] == []


@pytest.mark.parametrize("runtime", ["crun", "podman"])
def test_shared_memory_is_handed_over_to_every_runtime(packaged_lab: Lab, runtime: Runtime) -> None:
    """CRIU traces the first task, which is the runtime's child; and it is let go of, and traced again."""
    scene = scene_of(packaged_lab, runtime, "shared_server")
    try:
        for to in ("beta", "alpha"):
            scene.begin_hop()
            said = migrate(packaged_lab, scene.workload.name, to)
            assert (said.status, said.report["outcome"]) == (0, "moved"), said.stderr
            assert "copied in the freeze" not in " ".join(said.report["warnings"])
            assert said.report["bytes"]["pre_copy"] > 8 << 20 > said.report["bytes"]["frozen"]
            scene.unharmed(to)
            assert scene.clients[0].check_memory() == {"pages": 2048, "wrong_pages": 0}
    finally:
        scene.close()


def test_files_of_a_tmpfs_are_handed_over_to_crun(packaged_lab: Lab) -> None:
    """As to runc (`test_tmpfs`): CRIU reads what is external in its configuration file, whoever has started it."""
    scene = scene_of(packaged_lab, "crun", "tmpfs_files")
    try:
        for to in ("beta", "alpha", "beta"):
            scene.begin_hop()
            said = migrate(packaged_lab, scene.workload.name, to)
            assert (said.status, said.report["outcome"]) == (0, "moved"), said.stderr
            assert said.report["bytes"]["pre_copy"] > 4 << 20  # what is mapped and closed is half of all
            scene.unharmed(to)
            assert scene.clients[0].check_memory() == {"pages": 2048, "wrong_pages": 0}
    finally:
        scene.close()
