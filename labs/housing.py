"""Real services on the lab's hosts: their directory on shared storage, their container on every host."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from labs import boot, oci, podman, workloads
from labs.catalogue.base import Service
from labs.clients.control import ClientProcess
from labs.commands import LabError
from labs.lab import Lab
from labs.machines import Host
from labs.topology import HOSTS, PREFIX
from labs.workloads import Workload

Runtime = Literal["runc", "crun", "podman", "process"]
SERVICES = f"/{boot.SHARED}"
ANSWER_TIMEOUT_S = 120.0

# What a service says goes into a file of its own mounts: a stream of the host's could not be restored elsewhere.
SAY_IN_FILE = ["sh", "-c", 'exec "$@" >>"$0" 2>&1']

#: Starts a plain process in a session of its own, which is what CRIU dumps, with nothing of who starts it.
IN_BACKGROUND = ["setsid", "--fork", "sh", "-c", 'cd / && echo $$ >"$0" && exec "$@" </dev/null >/dev/null 2>&1']


def house(lab: Lab, service: Service, runtime: Runtime = "runc") -> Workload:
    """Make the service ready to be started on any host, with a new directory, and known to livemove."""
    name = service.name
    workload = Workload(
        name=name,
        runtime=runtime,
        addresses=(f"{service.address}/{PREFIX}",),
        container=name if runtime != "process" else None,
        bundle=f"/srv/{name}" if runtime in ("runc", "crun") else None,
        pid_file=f"/run/{name}.pid" if runtime == "process" else None,
        port=service.port,
    )
    _make_known(lab, workload)
    uid, gid = _make_directory(lab.host(HOSTS[0].name), service)
    command = [*SAY_IN_FILE, output(service), *(_filled(word, service) for word in service.command)]
    environment = {name: _filled(value, service) for name, value in service.environment.items()}
    if runtime == "process":
        variables = [
            f"{name}={value}" for name, value in {"PATH": oci.PATH, **environment, **service.as_process}.items()
        ]
        launch = [*IN_BACKGROUND, f"/run/{name}.pid", "env", "-i", *variables, *_user(uid, gid), *command]
        return replace(workload, launch=tuple(launch))
    for station in HOSTS:
        host = lab.host(station.name)
        if runtime == "podman":
            podman.install(host, workload, command, environment, _podman_options(service, uid, gid))
            continue
        description = oci.config(
            name=name,
            hostname=service.name,
            command=command,
            environment=environment,
            uid=uid,
            gid=gid,
            capabilities=service.capabilities,
            data=directory(service),
        )
        workloads.put_bundle(host, workload, description)
    return workload


def _make_known(lab: Lab, workload: Workload) -> None:
    """Instead of what a run that was kept has left of it, perhaps under another runtime."""
    if workload.name in tomllib.loads(lab.config_path.read_text())["workloads"]:
        workloads.stop(lab, replace(Workload.of_lab(lab, workload.name), port=workload.port))
        lab.forget_workload(workload.name)
    lab.add_workload(workload)


def _podman_options(service: Service, uid: int, gid: int) -> list[str]:
    """What `oci.config` says of the container. podman's own seccomp profile refuses io_uring, and its /dev/shm is a
    mount of the host's, which does not move."""
    options = [
        f"--user={uid}:{gid}",
        "--security-opt=no-new-privileges",
        f"--volume={directory(service)}:{directory(service)}",
    ]
    options += ["--cap-drop=all", *(f"--cap-add={each}" for each in service.capabilities)]
    return [*options, "--mount=type=tmpfs,destination=/dev/shm"]


def directory(service: Service) -> str:
    """The service's directory, at the same path on every host and in the container."""
    return f"{SERVICES}/{service.name}"


def output(service: Service) -> str:
    """The file with what the service has said."""
    return f"{directory(service)}/output"


def start(lab: Lab, service: Service, workload: Workload, host: str) -> None:
    """Start the housed service; a failure has its last words. Undo: `workloads.stop`."""
    try:
        workloads.start(lab, workload, host)
    except LabError as error:
        said = lab.host(host).run(["tail", "-n", "20", output(service)], check=False).stdout
        raise LabError(f"{error}\n{said}".rstrip()) from None


def memory_mb(host: Host, workload: Workload) -> float:
    """What the service's processes use in memory, shared pages counted once (PSS, proc(5))."""
    pids = workloads.processes(host, workload)
    rollups = host.run(["cat", *(f"/proc/{pid}/smaps_rollup" for pid in pids)], check=False).stdout
    return round(sum(map(int, re.findall(r"^Pss: +(\d+) kB", rollups, re.MULTILINE))) / 1024, 1)


class ServiceClients(ClientProcess):
    """The service's clients at work (`labs/clients/sessions.py`), until `stop`."""

    def __init__(self, lab: Lab, service: Service) -> None:
        folder = lab.paths.shared / service.name
        where = ["--address", service.address, "--port", str(service.port), "--folder", str(folder)]
        super().__init__(lab, f"labs.clients.{service.name}", where, answer_timeout_s=ANSWER_TIMEOUT_S)

    def begin_hop(self) -> None:
        """From now on count for a hop."""
        self._ask("begin")

    def end_hop(self) -> dict[str, Any]:
        """What the sessions saw since `begin_hop`: `labs.clients.sessions.Seen` as a dictionary."""
        return self._ask("end")


def _make_directory(host: Host, service: Service) -> tuple[int, int]:
    """Files first, then the commands; all of it the user's own."""
    path = directory(service)
    uid, gid = (int(host.run(["id", option, service.user]).stdout) for option in ("-u", "-g"))
    host.run(["rm", "-rf", path])
    host.run(["install", "-d", "-m", "0700", "-o", str(uid), "-g", str(gid), path])
    for name, content in service.files.items():
        host.write_file(f"{path}/{name}", _filled(content, service))
    host.run(["chown", "-R", f"{uid}:{gid}", path])
    for command in service.setup:
        _as_user(host, uid, gid, ["sh", "-ec", f"cd {shlex.quote(path)}; {_filled(command, service)}"])
    return uid, gid


def _as_user(host: Host, uid: int, gid: int, argv: Sequence[str]) -> None:
    host.run([*_user(uid, gid), *argv])


def _user(uid: int, gid: int) -> list[str]:
    return ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]


def _filled(text: str, service: Service) -> str:
    values = {"@ADDRESS@": service.address, "@PORT@": str(service.port), "@DATA@": directory(service)}
    return re.sub("|".join(values), lambda found: values[found[0]], text)
