"""The registry of obstacles: what an agent may find in a workload. What to do about each it says itself, in
``agent/obstacles.py`` and ``agent/runtimes``. docs/checks.md is generated from it too.

A code never changes its meaning once released.
"""

from __future__ import annotations

NEEDS_CAP_SYS_RESOURCE = "UID_NEEDS_CAP_SYS_RESOURCE"  # a self-test with another uid disproves it

#: Code → meaning.
OBSTACLES: dict[str, str] = {
    "OWN_NETWORK_NAMESPACE": "The workload has a network namespace of its own that cannot be made again elsewhere.",
    NEEDS_CAP_SYS_RESOURCE: "A process has another uid than root, which CRIU cannot dump here: no CAP_SYS_RESOURCE.",
    "IO_URING": "A process uses io_uring.",
    "TERMINAL": "A plain process, or the first one of a runc or crun container, has a terminal as standard stream "
    "that is held by no process of the workload.",
    "SOCKET_MPTCP": "A connection or listener is Multipath TCP, which CRIU cannot dump.",
    "SOCKET_KTLS": "A connection has its TLS in the kernel, which CRIU cannot dump.",
    "SOCKET_PACKET": "The workload has a packet socket.",
    "SOCKET_RAW": "The workload has a raw socket.",
    "SOCKET_UNIX_OUTSIDE": "A unix socket is connected to a process outside the workload.",
    "SOCKET_ON_DEVICE": "A socket is bound to a device, which the destination needs too.",
    "SOCKET_MULTICAST": "A socket is bound to a multicast group, whose membership does not move.",
    "FILE_OUTSIDE": "A process has an open file of none of the mounts it sees, such as a log file of the host's.",
    "SYSV_SHARED_WITH_HOST": "A process uses System V shared memory in the host's own IPC namespace.",
    "USER_NAMESPACE": "The container has a user namespace, in which CRIU cannot restore TCP connections.",
    "HOST_DEVICES": "The container has devices of its host, a GPU for instance.",
    "LIMITS_CHANGED": "The container's control group has other limits than its config.json, the destination's.",
    "IN_A_POD": "The container is in a pod: it shares namespaces with containers that stay.",
    "PODMAN_RUNTIME": "podman runs the container with another OCI runtime than crun.",
    "PODMAN_RESTARTS": "podman starts the container anew, or removes it, when its processes end: also after a move.",
    "PODMAN_OPTION": "podman's container has an option with which it cannot be moved.",
    "PODMAN_SHM": "The container has files in /dev/shm, which podman keeps on the host.",
    "DELETED_FILE_LARGE": "A process has a large file open that is deleted, which would have to go into CRIU's images.",
    "VOLUME_NOT_MOUNTED": "The configuration names a volume that the container does not have.",
    "ROOT_STAYS": "The container writes to a root file system that the runtime keeps by itself (podman).",
    "EXTERNAL_PIPE": "A plain process, or the first one of a runc or crun container, has a pipe as standard stream "
    "of which the workload has one end only.",
}
