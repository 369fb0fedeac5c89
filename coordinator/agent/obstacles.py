"""What of a running workload CRIU would refuse or lose, read from /proc. docs/checks.md lists the codes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from coordinator.agent.tasks import PROC
from coordinator.facts import Obstacle, WorkloadSpec
from netfix import inventory

#: Of a deleted file that CRIU is told to put into its images, which have room for this beside the memory.
MOST_DELETED_BYTES = 32 << 20


def obstacles(
    workload: WorkloadSpec, pids: list[int], missing_capabilities: tuple[str, ...], proc: Path = PROC
) -> tuple[Obstacle, ...]:
    """All obstacles of the process tree, each kind once, with the first process that has it."""
    found: dict[str, Obstacle] = {}
    for pid in pids:
        for obstacle in _of_process(pid, missing_capabilities, proc):
            found.setdefault(obstacle.code, obstacle)
    # The streams of a container's other processes are mostly its own. podman's monitor takes its streams along.
    inside = _pipes_inside(pids, proc)
    if workload.runtime == "process":  # a container's own terminals have the same names as the host's
        inside |= _terminals_inside(pids, proc)
    for pid in {"process": pids, "podman": []}.get(workload.runtime, pids[:1]):
        for obstacle in _streams(pid, inside, proc):
            found.setdefault(obstacle.code, obstacle)
    if pids and _namespace("self", proc) != _namespace(str(pids[0]), proc):
        found["USER_NAMESPACE"] = Obstacle(
            code="USER_NAMESPACE",
            message=f"process {pids[0]} has a user namespace of its own",
            hint="Run the container without one: CRIU would need CAP_NET_ADMIN over its network from within it.",
        )
    return tuple(found.values())


def _namespace(process: str, proc: Path) -> str:
    """The user namespace of a process; empty if it is gone."""
    try:
        return str((proc / process / "ns/user").readlink())
    except OSError:
        return ""


#: netfix's findings that stand in a move's way, with our codes. Those about addresses preflight makes itself, and those
#: that are gone a moment later (``netfix.inventory.TRANSIENT``) say nothing about a move that comes later.
_SOCKET_CODES = {
    inventory.MPTCP: "SOCKET_MPTCP",
    inventory.KTLS: "SOCKET_KTLS",
    inventory.PACKET_SOCKET: "SOCKET_PACKET",
    inventory.RAW_SOCKET: "SOCKET_RAW",
    inventory.UNIX_OUTSIDE: "SOCKET_UNIX_OUTSIDE",
    inventory.DEVICE: "SOCKET_ON_DEVICE",
    inventory.MULTICAST: "SOCKET_MULTICAST",
}


def socket_obstacles(findings: list[inventory.SocketFinding]) -> tuple[Obstacle, ...]:
    """Sockets that would be lost or changed (pure)."""
    return tuple(
        Obstacle(code=_SOCKET_CODES[each.code], message=each.message, hint=each.hint, fatal=each.fatal)
        for each in findings
        if each.code in _SOCKET_CODES
    )


def _of_process(pid: int, missing_capabilities: tuple[str, ...], proc: Path) -> list[Obstacle]:
    found = []
    if "CAP_SYS_RESOURCE" in missing_capabilities and (uid := _uid(pid, proc)) not in (0, None):
        found.append(
            Obstacle(
                code="UID_NEEDS_CAP_SYS_RESOURCE",
                message=f"process {pid} runs as uid {uid}, and CRIU needs CAP_SYS_RESOURCE to read its limits",
                hint="Give root on this host CAP_SYS_RESOURCE, or run the service as uid 0.",
            )
        )
    if segment := _shared_sysv_segment(pid, proc):
        found.append(
            Obstacle(
                code="SYSV_SHARED_WITH_HOST",
                message=f"process {pid} has the System V segment {segment} in this host's own IPC namespace",
                hint="Give the container an IPC namespace of its own: CRIU moves segments only with their namespace.",
            )
        )
    mounts = _mount_ids(pid, proc)
    for descriptor, target in _descriptors(pid, proc):
        if _is_outside(pid, descriptor, mounts, proc):
            found.append(
                Obstacle(
                    code="FILE_OUTSIDE",
                    message=f"process {pid} has {target}, which is in none of its mounts, as descriptor {descriptor}",
                    hint="Let it open the file itself, inside the container, or start it with /dev/null.",
                )
            )
        if (deleted := _deleted_bytes(pid, descriptor, target, proc)) > MOST_DELETED_BYTES:
            found.append(
                Obstacle(
                    code="DELETED_FILE_LARGE",
                    message=f"process {pid} has a deleted file of {deleted >> 20} MiB open, as descriptor {descriptor}",
                    hint=f"Let it close the file, or keep it below {MOST_DELETED_BYTES >> 20} MiB.",
                )
            )
        if target == "anon_inode:[io_uring]":
            found.append(
                Obstacle(
                    code="IO_URING",
                    message=f"process {pid} uses io_uring (descriptor {descriptor}), which CRIU cannot dump",
                    hint="Refuse io_uring_setup with ENOSYS in the seccomp profile, or turn it off in the service.",
                )
            )
    return found


def _pipes_inside(pids: list[int], proc: Path) -> set[str]:
    """The pipes of which the workload has both ends: they move with it."""
    ends: dict[str, set[str]] = {}
    for pid in pids:
        for descriptor, target in _descriptors(pid, proc):
            if target.startswith("pipe:"):
                mode = int(_fdinfo(pid, descriptor, "flags", proc) or "0", 8) & os.O_ACCMODE
                ends.setdefault(target, set()).update({os.O_RDONLY: "r", os.O_WRONLY: "w"}.get(mode, "rw"))
    return {pipe for pipe, held in ends.items() if held == {"r", "w"}}


def _terminals_inside(pids: list[int], proc: Path) -> set[str]:
    """The terminals of which the workload has the master, and the masters: they move with it."""
    found = set()
    for pid in pids:
        for descriptor, target in _descriptors(pid, proc):
            if target.endswith("/ptmx"):
                found |= {target, f"/dev/pts/{_fdinfo(pid, descriptor, 'tty-index', proc)}"}
    return found


def _streams(pid: int, inside: set[str], proc: Path) -> list[Obstacle]:
    """Standard streams that lead to something outside the workload."""
    found = []
    for descriptor, target in _descriptors(pid, proc):
        if target in inside:
            continue
        if descriptor in (0, 1, 2) and target.startswith(("/dev/pts/", "/dev/console")):
            found.append(
                Obstacle(
                    code="TERMINAL",
                    message=f"process {pid} has the terminal {target} as descriptor {descriptor}, held outside",
                    hint="Start it with setsid and its standard streams at /dev/null; a container without a terminal.",
                )
            )
        if descriptor in (0, 1, 2) and target.startswith("pipe:"):
            found.append(
                Obstacle(
                    code="EXTERNAL_PIPE",
                    message=f"process {pid} has a pipe to another process of this host as descriptor {descriptor}",
                    hint="Let it log to a file of its own or to /dev/null; or use podman, which takes its log.",
                )
            )
    return found


def _shared_sysv_segment(pid: int, proc: Path) -> str:
    """A System V segment that the process has mapped, if its IPC namespace is also ours (criu/proc_parse.c: "doesn't
    live in IPC ns")."""
    try:
        if (proc / str(pid) / "ns/ipc").readlink() != (proc / "self/ns/ipc").readlink():
            return ""
        lines = (proc / str(pid) / "maps").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split()[5] for line in lines if line.partition("/")[2].startswith("SYSV")), "")


def _mount_ids(pid: int, proc: Path) -> frozenset[str]:
    """The ids of the mounts that the process sees (proc(5), mountinfo)."""
    try:
        return frozenset(line.split()[0] for line in (proc / str(pid) / "mountinfo").read_text().splitlines())
    except OSError:
        return frozenset()


def _is_outside(pid: int, descriptor: int, mounts: frozenset[str], proc: Path) -> bool:
    """Whether an open file belongs to a mount that the process does not see: a file of the host's, handed into a
    container (criu/files-reg.c: "Can't lookup mount"). A memfd is in no mount at all, and no hindrance."""
    try:
        file = proc / str(pid) / "fd" / str(descriptor)
        if not mounts or not file.is_file() or str(file.readlink()).startswith("/memfd:"):
            return False
    except OSError:
        return False  # it ended, or closed the descriptor, while we looked
    mount = _fdinfo(pid, descriptor, "mnt_id", proc)
    return bool(mount) and mount not in mounts


def _fdinfo(pid: int, descriptor: int, name: str, proc: Path) -> str:
    """What proc(5) tells of an open file under a name; empty if nothing, or if it is closed by now."""
    try:
        lines = (proc / str(pid) / "fdinfo" / str(descriptor)).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split()[1] for line in lines if line.startswith(f"{name}:")), "")


def _deleted_bytes(pid: int, descriptor: int, target: str, proc: Path) -> int:
    """What a file has on its disk that only this descriptor keeps: CRIU puts it into the images (criu/files-reg.c,
    dump_ghost_file). A memfd is memory."""
    try:
        about = (proc / str(pid) / "fd" / str(descriptor)).stat()
    except OSError:
        return 0
    is_ghost = stat.S_ISREG(about.st_mode) and about.st_nlink == 0 and not target.startswith("/memfd:")
    return about.st_blocks * 512 if is_ghost else 0


def _uid(pid: int, proc: Path) -> int | None:
    try:
        return (proc / str(pid)).stat().st_uid
    except FileNotFoundError:
        return None


def _descriptors(pid: int, proc: Path) -> list[tuple[int, str]]:
    try:
        return [(int(entry.name), str(entry.readlink())) for entry in (proc / str(pid) / "fd").iterdir()]
    except OSError:
        return []  # it ended, or closed a descriptor, while we looked: the next check sees what is there then
