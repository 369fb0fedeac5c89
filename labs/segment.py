"""The Ethernet segment: a bridge in a network namespace of its own, and a cable from it to every machine.

Cables are made inside the segment's namespace with their far end directly in the machine's, so that no interface
of the lab is ever in the namespace of the machine that runs it.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from labs.commands import failure, run
from labs.state import Paths, is_bound
from labs.topology import INTERFACE, PREFIX, PREFIX6, STATIONS, Station

SEGMENT = "segment"
BRIDGE, BRIDGE_PORT = "br0", "eth1"
CAPTURE_START_S = 10.0
CAPTURE_BUFFER_KIB = 65536


def make(paths: Paths) -> None:
    """All namespaces, the bridge, the cables and the addresses. Undo: `destroy`."""
    paths.netns(SEGMENT).parent.mkdir()
    for name in (SEGMENT, *(station.name for station in STATIONS)):
        paths.netns(name).touch()
        run(["unshare", f"--net={paths.netns(name)}", "true"])
    _in_namespace(paths, SEGMENT, {"net/ipv6/conf/all/disable_ipv6": 1}, _bridge(paths))
    for station in STATIONS:
        # Duplicate address detection would hold the addresses back for a second, and they are ours to choose.
        quiet = {f"net/ipv6/conf/{conf}/{key}": 0 for conf in ("all", "default") for key in ("accept_dad", "accept_ra")}
        _in_namespace(paths, station.name, quiet, _addresses(station))


def destroy(paths: Paths) -> None:
    """Let go of every namespace; the kernel removes it with its interfaces when nothing runs in it."""
    directory = paths.netns(SEGMENT).parent
    if not directory.exists():
        return
    for path in directory.iterdir():
        if is_bound(path):
            run(["umount", str(path)])
        path.unlink()
    directory.rmdir()


def _bridge(paths: Paths) -> list[str]:
    batch = [
        f"link add {SEGMENT} type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
        f"link set {SEGMENT} up",
        "link set lo up",
    ]
    for station in STATIONS:
        far_end = f"name {INTERFACE} netns {paths.netns(station.name)} address {station.mac}"
        batch += [
            f"link add {station.name} type veth peer {far_end}",
            f"link set {station.name} master {SEGMENT} up",
        ]
    return batch


def add_bridge(paths: Paths, station: Station) -> None:
    """Give a host a bridge with a cable of its own to the segment, for containers. Undo: `remove_bridge`."""
    far_end = f"name {BRIDGE_PORT} netns {paths.netns(station.name)}"
    cable = [f"link add {station.name}-br type veth peer {far_end}", f"link set {station.name}-br master {SEGMENT} up"]
    _in_namespace(paths, SEGMENT, {}, cable)
    bridge = [
        f"link add {BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
        f"link set {BRIDGE_PORT} master {BRIDGE} up",
    ]
    _in_namespace(paths, station.name, {}, bridge)
    # A second way into the host: it must not answer there for the addresses that are on its first interface.
    deaf = {f"net/ipv4/conf/{BRIDGE}/arp_ignore": 8, f"net/ipv6/conf/{BRIDGE}/disable_ipv6": 1}
    _in_namespace(paths, station.name, deaf, [f"link set {BRIDGE} up"])


def remove_bridge(paths: Paths, station: Station) -> None:
    """Take bridge and cable away again."""
    _in_namespace(paths, station.name, {}, [f"link del {BRIDGE}", f"link del {BRIDGE_PORT}"])


def _addresses(station: Station) -> list[str]:
    return [
        "link set lo up",
        f"address add {station.address}/{PREFIX} broadcast + dev {INTERFACE}",
        f"address add {station.address6}/{PREFIX6} nodad dev {INTERFACE}",
        f"link set {INTERFACE} up",
    ]


def _in_namespace(paths: Paths, name: str, sysctls: dict[str, int], batch: list[str]) -> None:
    """Set sysctls and run `ip` commands inside a namespace, in one process each."""
    enter = ["nsenter", f"--net={paths.netns(name)}"]
    # /proc/sys/net shows the namespace of whoever opens it: no mount is needed.
    writes = "; ".join(f"echo {value} >/proc/sys/{key}" for key, value in sysctls.items())
    run([*enter, "sh", "-ec", writes])
    run([*enter, "ip", "-batch", "-"], input="\n".join(batch) + "\n")


@dataclass
class Capture:
    """A packet capture of the whole segment: every frame once, with its Ethernet header."""

    path: Path
    dropped: int | None = None  # frames the kernel lost; known once the capture has ended


@contextmanager
def capture(paths: Paths, path: Path, expression: str = "") -> Iterator[Capture]:
    """Record what passes the bridge and matches the tcpdump expression, from here to the end of the block.

    Let the path end in .pcap: AppArmor, where it is on, lets tcpdump write nothing else.
    """
    argv = ["nsenter", f"--net={paths.netns(SEGMENT)}", "tcpdump", "--immediate-mode", "-n", "-s", "0", "-Z", "root"]
    argv += ["-i", SEGMENT, "-B", str(CAPTURE_BUFFER_KIB), "-U", "-w", str(path), *([expression] if expression else [])]
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    recording = Capture(path)
    said = ""
    try:
        said = _wait_until_listening(argv, process)
        yield recording
        # Frames of the last moments are still between the kernel's ring and the file.
        time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=CAPTURE_START_S)
        said += rest.decode(errors="replace")
    for line in said.splitlines():
        if line.endswith("dropped by kernel"):
            recording.dropped = int(line.split()[0])


def _wait_until_listening(argv: list[str], process: subprocess.Popen[bytes]) -> str:
    """Read what tcpdump says until it records."""
    assert process.stderr is not None
    said = b""
    deadline = time.monotonic() + CAPTURE_START_S
    while b"listening on" not in said:
        ready, _, _ = select.select([process.stderr], [], [], max(0.0, deadline - time.monotonic()))
        chunk = os.read(process.stderr.fileno(), 4096) if ready else b""
        if not chunk:
            process.kill()
            raise failure(argv, process.wait(), said.decode(errors="replace") or "said nothing")
        said += chunk
    return said.decode(errors="replace")


def is_made(paths: Paths) -> bool:
    return all(is_bound(paths.netns(name)) for name in (SEGMENT, *(station.name for station in STATIONS)))
