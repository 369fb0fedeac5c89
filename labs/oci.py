"""The OCI runtime configuration of the lab's containers: pure, one function, plain JSON data.

What matters for a move is said where it is. The rest is what `runc spec` writes, with fewer mounts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
CAPABILITIES = ["CAP_KILL", "CAP_NET_BIND_SERVICE"]
CAPABILITY_SETS = ("bounding", "effective", "permitted")

ROOT = "mkdir -p {rootfs} && {{ mountpoint -q {rootfs} || mount --bind / {rootfs}; }}"
"""Makes a container's root: the host's own, read-only; what is mounted in the host is not in it."""

DEVPTS = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]
SHM_SIZE = "4g"
"""How much a service may put into /dev/shm: no more than the host has, which is not reserved."""

IO_URING = ["io_uring_setup", "io_uring_enter", "io_uring_register"]
ENOSYS = 38

#: By cgroup controller: a kind of limit, and the limit.
LIMITS: dict[str, tuple[str, Any]] = {
    "hugetlb": ("hugepageLimits", [{"pageSize": "2MB", "limit": 8 << 20}]),
    "memory": ("memory", {"limit": 1 << 30}),
    "pids": ("pids", {"limit": 500}),
}


def config(
    *,
    name: str,
    hostname: str,
    command: list[str],
    environment: dict[str, str],
    netns: str = "",
    uid: int = 0,
    gid: int = 0,
    capabilities: Sequence[str] = CAPABILITIES,
    data: str = "",
) -> dict[str, Any]:
    """A read-only container without a terminal, in the host's own network or in the namespace of that name.

    `data`: a directory of the host that the container can write to, at the same path.
    """
    # Else no network namespace: the service's address is one of the host's, as livemove moves it.
    network = [{"type": "network", "path": f"/run/netns/{netns}"}] if netns else []
    variables = {"PATH": PATH, **environment}
    return {
        "ociVersion": "1.2.0",
        "hostname": hostname,
        "process": {
            # A terminal is a pty of this host, held by a process of this host: neither comes along.
            "terminal": False,
            "user": {"uid": uid, "gid": gid},
            "args": command,
            "env": [f"{key}={value}" for key, value in variables.items()],
            "cwd": "/",
            "capabilities": {kind: list(capabilities) for kind in CAPABILITY_SETS},
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            _tmpfs("/dev", "mode=755", "size=65536k", "strictatime", "nosuid"),
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": DEVPTS},
            _tmpfs("/dev/shm", "mode=1777", f"size={SHM_SIZE}", "nosuid", "nodev"),
            _tmpfs("/run", "mode=755", "size=16384k", "nosuid", "nodev"),
            _tmpfs("/tmp", "mode=1777", "size=65536k", "nosuid", "nodev"),
            *([{"destination": data, "type": "bind", "source": data, "options": ["rbind", "rw"]}] if data else []),
        ],
        "linux": {
            "namespaces": [*({"type": kind} for kind in ("pid", "ipc", "uts", "mount", "cgroup")), *network],
            "cgroupsPath": f"/{name}",
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "seccomp": _without_io_uring(),
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }


def with_a_household(config: dict[str, Any], data: str) -> dict[str, Any]:
    """The same container with what `labs.programs.household` needs: terminals, a bind mount, and limits."""
    terminals = {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": DEVPTS}
    bound = {"destination": "/mnt", "type": "bind", "source": data, "options": ["bind", "rw"]}
    limits = [{"type": "RLIMIT_NOFILE", "soft": 900, "hard": 1000}]
    mounts = [*config["mounts"], terminals, bound]
    return config | {"mounts": mounts, "process": config["process"] | {"rlimits": limits}}


def with_limits(config: dict[str, Any], controllers: Sequence[str]) -> dict[str, Any]:
    """The same container with a limit of each kind for which the host has a cgroup controller."""
    limits = {kind: limit for controller, (kind, limit) in LIMITS.items() if controller in controllers}
    linux = config["linux"] | {"resources": config["linux"]["resources"] | limits}
    return config | {"linux": linux}


def with_a_user_namespace(config: dict[str, Any]) -> dict[str, Any]:
    """The same container in a user namespace whose root is the host's."""
    everyone = [{"containerID": 0, "hostID": 0, "size": 65536}]
    linux = config["linux"] | {"uidMappings": everyone, "gidMappings": everyone}
    linux["namespaces"] = [*linux["namespaces"], {"type": "user"}]
    return config | {"linux": linux}


def _tmpfs(destination: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": "tmpfs", "source": "tmpfs", "options": list(options)}


def _without_io_uring() -> dict[str, Any]:
    """CRIU cannot dump io_uring. Programs that find it missing (ENOSYS) fall back to what can be moved."""
    refused = {"names": IO_URING, "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS}
    return {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [refused]}
