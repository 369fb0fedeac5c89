"""The registry of checks: each code with its meaning. docs/checks.md is generated from it; a test compares the two.

A code never changes its meaning once released.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Check:
    """What a code means, how bad it is, and what to do about it."""

    code: str
    severity: Severity
    meaning: str
    hint: str


CHECKS: dict[str, Check] = {
    check.code: check
    for check in (
        # ------------------------------------------------ one host
        Check("PYTHON_TOO_OLD", "error", "The host's python3 is older than 3.11.", "Install python3 ≥ 3.11."),
        Check("NOT_ROOT", "error", "The login is not root.", 'Log in as root: ssh = "root@ADDRESS".'),
        Check(
            "CAPABILITY_MISSING",
            "error",
            "Root lacks a capability without which nothing can be dumped, restored or gated.",
            "Give the host (or its container) the named capability.",
        ),
        Check(
            "SYS_RESOURCE_MISSING",
            "warning",
            "CAP_SYS_RESOURCE is missing, and the self-test could not dump a process of another uid than root.",
            "Give the host CAP_SYS_RESOURCE, or run the service as uid 0.",
        ),
        Check("CRIU_MISSING", "error", "No criu is installed.", "Install CRIU ≥ 4.2."),
        Check(
            "CRIU_BROKEN", "error", "criu is installed, and `criu check` fails.", "Install a CRIU made for this kernel."
        ),
        Check(
            "CRIU_COMPLAINS",
            "warning",
            "`criu check` complains, although the self-test passed.",
            "If a dump fails, install a CRIU made for this kernel.",
        ),
        Check(
            "CRIU_OLD_FOR_KERNEL",
            "warning",
            "CRIU before 4.2 cannot dump sockets on a kernel from 6.16 on. The self-test decides.",
            "Install CRIU ≥ 4.2.",
        ),
        Check(
            "CRIU_FEATURE_MISSING",
            "error",
            "`criu check` denies a feature that livemove uses.",
            "Use a kernel and a CRIU that have the named feature.",
        ),
        Check(
            "SELF_TEST_FAILED",
            "error",
            "A small process with a TCP connection could not be dumped and restored on the host.",
            "The message has CRIU's first error; a CRIU made for this kernel is what most often helps.",
        ),
        Check(
            "WRITES_NOT_TRACKED",
            "warning",
            "The kernel cannot tell which pages a process wrote: all memory is sent while the service is frozen.",
            "Use Linux ≥ 6.13 (or 6.12.10), or a kernel with CONFIG_MEM_SOFT_DIRTY, on the host that runs the service.",
        ),
        Check("RUNTIME_MISSING", "error", "The runtime of the workload is not installed.", "Install the runtime."),
        Check(
            "CGROUP_MISSING",
            "error",
            "No cgroup hierarchy is mounted, and container runtimes need one.",
            "Mount cgroup2 at /sys/fs/cgroup.",
        ),
        Check(
            "NF_TABLES_MISSING",
            "error",
            "The kernel has no nf_tables, with which gates are made.",
            "Load the module: modprobe nf_tables.",
        ),
        Check(
            "INTERFACE_MISSING",
            "error",
            "The configured interface does not exist.",
            "Correct `interface` in the host's section.",
        ),
        Check("INTERFACE_DOWN", "error", "The interface is down.", "Bring it up: ip link set INTERFACE up."),
        Check(
            "INTERFACE_WITHOUT_MAC",
            "error",
            "The interface has no Ethernet address, so that nothing can be announced on it.",
            "Name the Ethernet interface that clients reach in the host's section.",
        ),
        Check(
            "INTERFACE_WITHOUT_ADDRESS",
            "warning",
            "The interface has no address: it is perhaps not the one that clients reach.",
            "Check `interface` in the host's section.",
        ),
        Check(
            "LEFTOVER",
            "warning",
            "A rule or table was left behind, by CRIU or by an earlier migration.",
            "Remove it before a service with that address runs here.",
        ),
        Check(
            "UNFINISHED",
            "warning",
            "A migration is unfinished on this host.",
            "`livemove status` shows it, `livemove recover ID` finishes or undoes it.",
        ),
        # ------------------------------------------------ the workload
        Check(
            "WORKLOAD_NOT_RUNNING",
            "error",
            "No host that answered runs the workload.",
            "Start the workload, or correct its section; `livemove status` shows where each workload runs.",
        ),
        Check(
            "RUNS_ON_SEVERAL",
            "error",
            "More than one host runs the workload, so that nothing can tell which one is to be moved.",
            "Stop all copies but one.",
        ),
        Check(
            "RUNTIME_LOST_IT",
            "error",
            "The runtime cannot tell what it has of the container, or lost its state file while the container runs.",
            "Where its command fails: run it there as root, and mend the runtime, also on a host that takes no part."
            " Where processes are left: end them (their control group's cgroup.kill), and start the container anew.",
        ),
        Check(
            "WORKLOAD_BUSY",
            "error",
            "The workload is being moved already, or an earlier move of it is unfinished.",
            "Wait for the other move, or finish it with `livemove recover ID`.",
        ),
        Check(
            "NO_SERVICE_SOCKET",
            "warning",
            "The workload has no socket on any of its service addresses.",
            "Check `addresses` in the workload's section: only connections to these addresses stay.",
        ),
        Check(
            "SOCKET_ON_OTHER_ADDRESS",
            "error",
            "A socket is bound to an address that stays on the source, so that it cannot be restored.",
            "Bind the service to its service address, also for the connections it makes; or add the address.",
        ),
        Check(
            "LOOPBACK_PEER_STAYS",
            "warning",
            "A loopback connection leads to a process that is no part of the workload: it will be cut.",
            "Move both ends together, or let the service connect again.",
        ),
        # ------------------------------------------------ source and destination together
        Check(
            "SAME_HOST",
            "error",
            "Source and destination are the same host.",
            "Name another host with --to.",
        ),
        Check(
            "HOST_NOT_ASKED",
            "warning",
            "A host that takes no part in the move could not be asked whether it runs the workload.",
            "Make sure that the workload does not run there too.",
        ),
        Check("ARCHITECTURE_DIFFERS", "error", "The hosts' machine types differ.", "Choose a host of the same type."),
        Check(
            "KERNEL_MUCH_OLDER",
            "warning",
            "The destination's kernel is much older: the service may use what it does not have.",
            "Choose a destination with a kernel about as new as the source's.",
        ),
        Check(
            "CRIU_VERSIONS_DIFFER",
            "warning",
            "The hosts' CRIU versions differ: images of one are not always read by the other.",
            "Install the same CRIU on both hosts.",
        ),
        Check(
            "CGROUP_DIFFERS",
            "error",
            "The hosts' cgroup modes differ, so that the runtime cannot restore the container's groups.",
            "Boot both hosts with the same mode, best cgroup v2.",
        ),
        Check(
            "MTU_DIFFERS",
            "warning",
            "The MTUs of the two interfaces differ: full-sized packets of old connections may get lost.",
            "Set the same MTU on both interfaces.",
        ),
        Check(
            "NOT_ENOUGH_SPACE",
            "error",
            "The images do not fit into the memory of a host.",
            "Free memory on the named host: images are kept in memory (tmpfs) during the freeze.",
        ),
        # ------------------------------------------------ the destination
        Check(
            "ALREADY_PRESENT",
            "error",
            "The destination has a container of that id, which is not running.",
            "Remove it there with the runtime: runc delete ID, crun delete ID.",
        ),
        Check(
            "BUNDLE_MISSING",
            "error",
            "The destination lacks the workload's bundle or files.",
            "Copy it there, to the same path.",
        ),
        Check(
            "BUNDLE_DIFFERS",
            "error",
            "The workload's bundle or files on the destination are not the source's.",
            "Make them equal on both hosts, sizes of open files included.",
        ),
        Check(
            "PID_TAKEN",
            "error",
            "A process id of the workload is in use on the destination.",
            "End that process, or run the service in a container, which has process ids of its own.",
        ),
        Check(
            "NAMESPACE_TAKEN",
            "error",
            "The destination has something where the workload's own network namespace is to be made.",
            "Remove it if nothing uses it: ip netns delete NAME.",
        ),
        Check(
            "NAMESPACE_PARENT_MISSING",
            "error",
            "The destination lacks the bridge or interface to which the workload's own network namespace is attached.",
            "Make a bridge of that name there, on the same segment.",
        ),
        Check(
            "NAMESPACE_OTHER_ADDRESS",
            "error",
            "The workload's own network namespace has an address that is not one of the workload's.",
            "Add it to `addresses` in the workload's section, or remove it from the namespace.",
        ),
        # ------------------------------------------------ the service addresses
        Check(
            "ADDRESS_NOT_ON_SOURCE",
            "error",
            "The source does not have the service address.",
            "Add it to the source's interface, or correct `addresses`.",
        ),
        Check(
            "ADDRESS_ON_OTHER_INTERFACE",
            "error",
            "The service address is on another interface than the configured one.",
            "Move it to the configured interface, or correct `interface`.",
        ),
        Check(
            "ADDRESS_ON_SEVERAL",
            "error",
            "The source has the service address on several interfaces, so that it would not be gone when it has moved.",
            "Remove it from all interfaces but the configured one: ip address del ADDRESS dev INTERFACE.",
        ),
        Check(
            "ADDRESS_ON_DESTINATION",
            "error",
            "The destination has the service address already.",
            "Remove it there: ip address del ADDRESS dev INTERFACE.",
        ),
        Check(
            "ADDRESS_ANSWERED_BY_OTHER",
            "error",
            "A machine that is not the source answers for the service address.",
            "Find the machine with that MAC address and take the address away from it.",
        ),
        Check(
            "ADDRESS_NOT_ANSWERED",
            "warning",
            "Nobody answered the destination's question for the service address: perhaps it is on another segment.",
            "Put both interfaces on one segment; otherwise clients do not hear where the address went.",
        ),
        Check(
            "ADDRESS_OUTSIDE_SUBNET",
            "warning",
            "The service address is in no subnet of the destination's interface.",
            "Check that clients and routers reach this address at the destination's interface.",
        ),
        Check(
            "HOOK_UNUSABLE",
            "error",
            "The workload's hook is missing on a host, or cannot be executed.",
            "Put it there, to the same path as on the other hosts, and make it executable: chmod 755.",
        ),
        Check(
            "ROUTER_UNREACHABLE",
            "error",
            "A host cannot ask the workload's router for its routes.",
            "Let root of that host log in to the router with its key, and know the router's host key.",
        ),
        Check(
            "ROUTE_NOT_TO_SOURCE",
            "error",
            "The router does not have a plain host route for the service address by way of the source.",
            "On the router: ip route replace ADDRESS/32 via SOURCE (ip -6 and /128 for IPv6); or correct `router`.",
        ),
        Check(
            "NEXT_HOP_MISSING",
            "error",
            "A host has no address of its own, of the service address's family, by which a router could reach it.",
            "Give its interface an address of that family.",
        ),
        Check(
            "MACVLAN_BEHIND_ROUTER",
            "error",
            "The workload's own network namespace is a macvlan, and the router sends its packets to the host, which"
            " cannot reach a macvlan on its own interface.",
            "Attach it by a veth to a bridge on every host; on one segment, let the mover be l2.",
        ),
        Check(
            "NOT_PASSED_ON",
            "error",
            "The destination does not pass on to the workload's own network namespace what the router sends it.",
            "Let it forward, and give it a host route for the address to the bridge.",
        ),
        Check(
            "FIREWALL_DROPS",
            "error",
            "A firewall on the destination drops what clients send to a port of the service.",
            "Add a rule there that accepts the port, before the one that drops it.",
        ),
        Check(
            "RSYNC_MISSING", "error", 'files = "sync", and a host has no rsync.', "Install rsync ≥ 3.2 on both hosts."
        ),
        Check(
            "FILES_MISSING",
            "error",
            "A directory of the workload is not there on the destination, and nothing copies it there.",
            'Put it there, or mount it; or have it copied: files = "sync".',
        ),
        Check(
            "FILES_DIFFER",
            "error",
            "A directory that is said to be present on both hosts has other content there.",
            'Make the two the same; or have it copied: files = "sync".',
        ),
        Check(
            "FILES_NOT_SHARED",
            "error",
            "A directory that is said to be shared is other storage on the destination, or that could not be told.",
            'Mount the same storage on both hosts; or have it copied: files = "sync".',
        ),
        Check(
            "FILES_IN_THE_WAY",
            "error",
            "A directory that is to be copied exists on the destination, with content that no move has left there.",
            "Look at what it is, and move it away or empty the directory.",
        ),
        Check(
            "FILES_ELSEWHERE",
            "error",
            "podman's container has another directory in its place on the destination: an anonymous volume, perhaps.",
            "Create the container on both hosts with the same directory or named volume: --volume NAME:/PATH.",
        ),
        Check(
            "FILES_UNUSABLE", "error", "A directory of the workload cannot be used.", "The message says what to mend."
        ),
        Check(
            "DISK_FULL",
            "error",
            "A directory that is to be copied does not fit into the destination's file system.",
            "Make room there, or mount a larger file system.",
        ),
        Check(
            "LEFTOVER_CUTS_SERVICE",
            "error",
            "A rule or table was left behind that would cut the moved service.",
            "Remove it as the message says, or reboot the host.",
        ),
    )
}
