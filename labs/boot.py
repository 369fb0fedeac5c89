"""Become a host: run in a process of its own, which turns into the host's init.

    python boot.py SPEC     (SPEC is a HostSpec as JSON; prints the pid of the host's init)

The process enters new namespaces, builds the host's file system over the read-only root and starts an init there
that reaps, with sshd under it. Standard library only: the interpreter starts in a few milliseconds.
Undo: end the host's control group. Its namespaces and all mounts in them go with its processes.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import stat
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_RDONLY, MS_REMOUNT, MS_BIND = 1, 0x20, 0x1000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
MNT_DETACH = 2
TTY_GROUP = 5

# On every host: a read-only root for containers, the lower directory of their overlays.
IMAGE = "srv/image"
# On every host the same directory, as if all had mounted it from a file server.
SHARED = "srv/shared"
INIT = ("/usr/bin/tini", "--", "/usr/sbin/sshd", "-D", "-E", "/var/log/sshd.log")
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}
DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
# Only where this machine has them.
OPTIONAL_DEVICES = ("fuse", "net/tun", "userfaultfd")
LINKS = {"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class HostSpec:
    """What a host is made of. All paths are this machine's."""

    name: str
    root: str  # read-only lower directory
    scratch: str  # mount point of what the host writes
    seed: str  # files put on the host
    shared: str  # storage that all hosts of the lab have
    netns: str
    group: str  # control group: the host's own; init/ is in it
    first_pid: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))


# The empty name is that of cgroup version 2. Groups of version 1, if this machine has any, are nothing of a host's; but
# the kernel shows them in /proc/PID/cgroup, and CRIU would dump them all, and make them again on this machine.
CRIU_SETTINGS = 'cgroup-dump-controller ""\n'


def _call(name: str, *arguments: object) -> None:
    """A system call that raises when it fails."""
    encoded = [value.encode() if isinstance(value, str) else value for value in arguments]
    if getattr(_libc, name)(*encoded) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}{arguments}: {os.strerror(code)}")


def _mount(source: str, target: Path, filesystem: str, flags: int = 0, options: str = "") -> None:
    target.mkdir(parents=True, exist_ok=True)
    _call("mount", source, str(target), filesystem, ctypes.c_ulong(flags), options)


def _join_group(group: str) -> None:
    Path(group, "cgroup.procs").write_text("0")


def enter_namespaces(spec: HostSpec) -> None:
    """All but the pid namespace, which only children are in."""
    _join_group(spec.group)
    with Path(spec.netns).open("rb") as netns:
        _call("setns", netns.fileno(), CLONE_NEWNET)
    flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWCGROUP | CLONE_NEWPID
    _call("unshare", ctypes.c_int(flags))
    # The namespace's root is the group of the unshare. Only groups without processes can hand controllers on
    # to the groups below them (to runc's containers): leave it.
    _join_group(f"{spec.group}/init")


def build_root(spec: HostSpec) -> Path:
    """The host's root: the cached one below, what the host writes on a tmpfs of its own."""
    _call("mount", "none", "/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
    scratch = Path(spec.scratch)
    _mount("scratch", scratch, "tmpfs", options="mode=0755")
    upper, work, root = scratch / "upper", scratch / "work", scratch / "root"
    for directory in (upper, work):
        directory.mkdir()
    _mount("root", root, "overlay", options=f"lowerdir={spec.root},upperdir={upper},workdir={work}")
    # An overlay over this overlay would hide from CRIU where a mapped file comes from ("Can't lookup mount"):
    # containers on the host get their root from the plain directory.
    image = root / IMAGE
    image.mkdir()
    for flags in (MS_BIND, MS_BIND | MS_REMOUNT | MS_RDONLY):
        _call("mount", spec.root, str(image), None, ctypes.c_ulong(flags), None)
    (root / SHARED).mkdir()
    _call("mount", spec.shared, str(root / SHARED), None, ctypes.c_ulong(MS_BIND), None)
    shutil.copytree(spec.seed, root, dirs_exist_ok=True, copy_function=shutil.copy)
    return root


def mount_system(root: Path) -> None:
    """What the kernel provides: /proc, /sys with cgroup2 alone, /dev, and the temporary file systems."""
    plain = MS_NOSUID | MS_NODEV | MS_NOEXEC
    _mount("proc", root / "proc", "proc", plain)
    _mount("sysfs", root / "sys", "sysfs", plain)
    _mount("cgroup2", root / "sys/fs/cgroup", "cgroup2", plain)
    criu = root / "etc/criu"
    criu.mkdir(exist_ok=True)
    (criu / "default.conf").write_text(CRIU_SETTINGS)
    _mount("dev", root / "dev", "tmpfs", MS_NOSUID, "mode=0755")
    _mount("devpts", root / "dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, f"mode=0620,ptmxmode=0666,gid={TTY_GROUP}")
    _mount("shm", root / "dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    with suppress(OSError):  # a kernel without message queues is a host all the same
        _mount("mqueue", root / "dev/mqueue", "mqueue", plain)
    _mount("run", root / "run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
    _mount("tmp", root / "tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    (root / "run/sshd").mkdir(mode=0o755)


def make_devices(dev: Path) -> None:
    """The devices every program expects, and those that this machine can lend."""
    os.umask(0)
    for name, number in DEVICES.items():
        os.mknod(dev / name, stat.S_IFCHR | 0o666, os.makedev(*number))
    for name in OPTIONAL_DEVICES:
        with suppress(FileNotFoundError):
            device = Path("/dev", name).stat().st_rdev
            (dev / name).parent.mkdir(exist_ok=True)
            os.mknod(dev / name, stat.S_IFCHR | 0o666, device)
    for name, target in LINKS.items():
        (dev / name).symlink_to(target)
    os.umask(0o022)


def delegate_controllers(group: Path) -> None:
    """Let containers on the host have whatever controllers the host has."""
    for controller in (group / "cgroup.controllers").read_text().split():
        with suppress(OSError):
            (group / "cgroup.subtree_control").write_text(f"+{controller}")


def become_init(spec: HostSpec) -> None:
    """Does not return: the process is the host's init from here on."""
    os.setsid()
    root = build_root(spec)
    mount_system(root)
    make_devices(root / "dev")
    # chroot would not do: CRIU wants the root of the mount namespace to be a mount that it can see.
    os.chdir(root)
    _call("pivot_root", ".", ".")
    _call("umount2", ".", MNT_DETACH)
    os.chdir("/")
    delegate_controllers(Path("/sys/fs/cgroup"))
    _call("sethostname", spec.name, len(spec.name))
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(spec.first_pid))
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.execve(INIT[0], INIT, ENVIRONMENT)


def main() -> int:
    spec = HostSpec(**json.loads(sys.argv[1]))
    # Closed by the exec: whoever reads it to the end knows that the host's init runs, or reads why not.
    failed, fail = os.pipe2(os.O_CLOEXEC)
    enter_namespaces(spec)
    pid = os.fork()
    if pid == 0:
        try:
            become_init(spec)
        except BaseException as error:
            os.write(fail, str(error).encode())
            os._exit(1)
    os.close(fail)
    with os.fdopen(failed) as pipe:
        problem = pipe.read()
    if problem:
        os.waitpid(pid, 0)
        print(f"host {spec.name}: {problem}", file=sys.stderr)
        return 1
    print(pid)
    return 0


if __name__ == "__main__":
    sys.exit(main())
