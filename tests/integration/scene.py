"""A service with clients at work, and the two questions every test of a move asks of it.

Does everybody still have what they had? Is anything left where nothing should be (invariant I5)?
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

from labs import config, workloads
from labs.clients.control import Clients
from labs.lab import Lab
from labs.segment import BRIDGE, BRIDGE_PORT
from labs.topology import HOSTS, INTERFACE, Station
from labs.workloads import PORT, Workload
from tests.integration.faults import until

CONNECTIONS = 20
HARMLESS = {"connections": CONNECTIONS, "lost": 0, "resets": 0, "wrong_bytes": 0}

#: What a host may show at rest is nothing: each line of output is something that was left behind.
LOOK = f"""\
nft list tables | sed 's/^/nft: /'
find /run/livemove /run/livemove-selftest-* 2>/dev/null | sed 's/^/file: /'
ls /run/netns 2>/dev/null | sed 's/^/netns: /'
ls /sys/class/net | grep -vE '^(lo|{INTERFACE}|{BRIDGE}|{BRIDGE_PORT})$' | sed 's/^/interface: /'
awk '$5 ~ "^/run/livemove" {{ print "mount: " $5 }}' /proc/self/mountinfo
for file in /proc/[0-9]*/cmdline; do
    tr '\\0\\n' '  ' <"$file" 2>/dev/null | grep -E 'coordinator[.]agent|criu |(crun|runc|container) (restore|check)' \\
        | cut -c-120 | sed "s,^,process $file: ,"
done
find /var/lib/livemove -type f 2>/dev/null | grep -vE '/(source|destination)[.]jsonl$|/left-over/' | sed 's/^/state: /'
find /var/cache/livemove -mindepth 1 -maxdepth 1 2>/dev/null | grep -vE '/(agents|self-test.json)$' | sed 's/^/cache: /'
ip -o address show dev {INTERFACE} | while read -r _ _ _ address _; do echo "address: $address"; done
true
"""


@dataclass
class Scene:
    """A workload on a host of the lab with clients that have been connected since it started."""

    lab: Lab
    workload: Workload
    clients: list[Clients]

    @classmethod
    def start(
        cls,
        lab: Lab,
        name: str,
        host: str = "alpha",
        *,
        memory_mb: int = 0,
        dirty_mb_s: float = 0.0,
        program: str = "pattern_server",
        network: Literal["host", "veth", "macvlan"] = "host",
    ) -> Scene:
        """Start a workload of the lab's configuration, with 20 connections in all, spread over its addresses."""
        known = Workload.of_lab(lab, name, memory_mb=memory_mb, dirty_mb_s=dirty_mb_s)
        workload = replace(known, program=program, network=network)
        workloads.stop(lab, workload)
        workloads.install(lab, workload)
        workloads.start(lab, workload, host)
        scene = cls(lab, workload, [])
        try:
            share = CONNECTIONS // len(workload.listens_on)
            for address in workload.listens_on:
                scene.clients.append(Clients(lab, address, PORT, share))
            scene.answers(10 * CONNECTIONS)
        except BaseException:
            scene.close()
            raise
        return scene

    @property
    def host(self) -> str:
        """Where the service listens: on one host, whatever happens (I1, I2)."""
        found = workloads.where(self.lab, self.workload)
        assert len(found) == 1, f"{self.workload.name} listens on {found}"
        return found[0]

    def answers(self, count: int) -> None:
        """Let the clients work until there were so many more answers."""
        wanted = self._answers() + count
        until(lambda: self._answers() >= wanted, f"{count} answers")

    def begin_hop(self) -> None:
        """From now on the clients count anew."""
        for clients in self.clients:
            clients.begin_hop()

    def unharmed(self, host: str) -> dict[str, Any]:
        """The service answers on the same connections, there and nowhere else, and nothing is left anywhere.

        Returns what the clients saw since `begin_hop`."""
        self.answers(5 * CONNECTIONS)
        seen = [clients.end_hop() for clients in self.clients]
        total = {name: sum(each[name] for each in seen) for name in HARMLESS}
        assert total == HARMLESS, [trouble for each in seen for trouble in each["troubles"]]
        assert self.host == host
        until(lambda: left_over(self.lab, self.workload, host) == [], lambda: left_over(self.lab, self.workload, host))
        return seen[0]

    def wrong_pages(self) -> str:
        """What the memory service tells of the pages it found to be wrong."""
        return workloads.wrong_pages(self.lab, self.workload)

    def close(self) -> None:
        """End clients and service."""
        for clients in self.clients:
            clients.close()
        workloads.stop(self.lab, self.workload)

    def _answers(self) -> int:
        return sum(int(clients.snapshot()["answers"]) for clients in self.clients)


def left_over(lab: Lab, workload: config.Workload, host: str) -> list[str]:
    """Everything on the hosts that a finished move should not have left, given that the service is on ``host``."""

    def of(station: Station) -> list[str]:
        allowed = {f"address: {station.address}/24", f"address: {station.address6}/64"}
        if station.name == host:
            allowed |= {f"address: {address}" for address in workload.addresses if not workload.netns}
            allowed |= {f"netns: {workload.netns}", f"interface: v-{workload.netns}"}
        lines = lab.host(station.name).run(["sh"], input=LOOK).stdout.splitlines()
        return [f"{station.name}: {line}" for line in lines if line not in allowed and "address: fe80" not in line]

    with ThreadPoolExecutor() as together:
        return [line for found in together.map(of, HOSTS) for line in found]


def journals(lab: Lab, host: str) -> dict[str, float]:
    """The journals on a host: path and time of the last change."""
    listed = lab.host(host).run(["sh", "-c", "find /var/lib/livemove -type f -printf '%T@ %p\\n' 2>/dev/null; true"])
    return {path: float(at) for at, path in (line.split() for line in listed.stdout.splitlines())}
