"""A client that is late on purpose: it keeps the last packet of handshakes and of closings until packets are diverted.

Runs in the clients machine on raw frames, with an IPv4 address that no kernel there has, so that it alone decides what
is answered. Ten times a second it opens a connection, up to the SYN-ACK, and another that it closes again, up to the
service's FIN. When the service address is announced by another host, it sends the acknowledgements that are due, to
there; on what it opened it also asks a question. It takes `seen` and `stop` on standard input.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import time
from dataclasses import dataclass, field

from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import ARP, Ether

from labs.programs.pattern import ASK, ClientHalf
from labs.topology import INTERFACE
from labs.workloads import PORT

EVERY_S = 0.1
YOUNG_S = 0.9
"""A handshake that is older is left alone: nobody waits for it."""
FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
BROADCAST = "ff:ff:ff:ff:ff:ff"


@dataclass
class Connection:
    """One connection; `due`: the frames that are kept back, and since when."""

    port: int
    closing: bool
    sequence: int = 1
    due: list[bytes] = field(default_factory=list)
    due_at: float = 0.0
    late: bool = False
    expected: int = 0
    half: ClientHalf = field(default_factory=lambda: ClientHalf(ASK, os.urandom(16), 0))


class LateClient:
    """See the module."""

    def __init__(self, mac: str, address: str, service: str) -> None:
        self._mac, self._address, self._service = mac, address, service
        self._service_mac = BROADCAST
        self._line = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
        self._line.bind((INTERFACE, 0x0003))
        self._connections: dict[int, Connection] = {}
        self._resets: list[str] = []
        self._wrong = 0
        self._diverted = False

    def find_service(self) -> None:
        """Ask who has the address, and wait for the answer."""
        while self._service_mac == BROADCAST:
            self._line.send(bytes(Ether(src=self._mac, dst=BROADCAST) / self._arp(1, BROADCAST, self._service)))
            self.turn(0.2)

    def open_two(self) -> None:
        if self._diverted:
            return
        for closing in (False, True):
            port = 20000 + len(self._connections)
            connection = self._connections[port] = Connection(port, closing)
            self._line.send(self._segment(connection, "S", 0))

    def turn(self, wait_s: float) -> None:
        """Take what comes until the time is over."""
        end = time.monotonic() + wait_s
        while (left := end - time.monotonic()) > 0:
            if select.select([self._line], [], [], left)[0]:
                frame = self._line.recv(65536)
                if frame[12:14] == b"\x08\x06":
                    self._take_arp(Ether(frame)[ARP])
                elif frame[12:14] == b"\x08\x00" and frame[23] == 6 and frame[30:34] == socket.inet_aton(self._address):
                    self._take_segment(frame[14:])

    def seen(self) -> dict[str, object]:
        late = [each for each in self._connections.values() if each.late]
        return {
            "opened_late": sum(not each.closing for each in late),
            "closed_late": sum(each.closing for each in late),
            "answered": sum(each.half.frames for each in late),
            "wrong_bytes": self._wrong,
            "resets": self._resets,
        }

    def _take_arp(self, arp: ARP) -> None:
        if arp.op == 1 and arp.pdst == self._address:
            self._line.send(bytes(Ether(src=self._mac, dst=arp.hwsrc) / self._arp(2, arp.hwsrc, arp.psrc)))
        elif arp.psrc == self._service and arp.hwsrc != self._service_mac:
            known, self._service_mac = self._service_mac != BROADCAST, arp.hwsrc
            if known and not self._diverted:
                self._diverted = True
                self._send_what_is_due()

    def _arp(self, operation: int, mac: str, address: str) -> ARP:
        return ARP(op=operation, hwsrc=self._mac, psrc=self._address, hwdst=mac, pdst=address)

    def _send_what_is_due(self) -> None:
        there = bytes.fromhex(self._service_mac.replace(":", ""))
        now = time.monotonic()
        for each in self._connections.values():
            if each.due and not each.late and (each.closing or now - each.due_at < YOUNG_S):
                each.late = True
                for frame in each.due:
                    self._line.send(there + frame[6:])

    def _take_segment(self, packet: bytes) -> None:
        tcp = packet[(packet[0] & 0x0F) * 4 : struct.unpack_from("!H", packet, 2)[0]]
        _, port, sequence, _, offset, flags = struct.unpack_from("!HHIIBB", tcp)
        connection = self._connections.get(port)
        if connection is None:
            return
        data = tcp[(offset >> 4) * 4 :]
        if flags & RST:
            kind = "closing" if connection.closing else "opening"
            self._resets.append(f"{kind}, {'late' if connection.late else 'not late'}")
        elif flags & SYN:
            self._take_syn_ack(connection, sequence)
        elif flags & FIN and connection.closing and not connection.due:
            connection.due = [self._segment(connection, "A", sequence + len(data) + 1)]
            self._send_if_diverted()
        elif data and sequence == connection.expected:
            connection.expected += len(data)
            self._wrong += connection.half.check(data)
            self._line.send(self._segment(connection, "A", connection.expected))

    def _take_syn_ack(self, connection: Connection, sequence: int) -> None:
        if connection.expected:
            return  # said again
        connection.expected = sequence + 1
        connection.sequence += 1
        if connection.closing:
            self._line.send(self._segment(connection, "A", connection.expected))
            self._line.send(self._segment(connection, "FA", connection.expected))
            connection.sequence += 1
            return
        question = connection.half.hello() + connection.half.record()
        acknowledgement = self._segment(connection, "A", connection.expected)
        connection.due = [acknowledgement, self._segment(connection, "PA", connection.expected, question)]
        connection.sequence += len(question)
        connection.due_at = time.monotonic()
        self._send_if_diverted()

    def _send_if_diverted(self) -> None:
        """What becomes due after the divert is not kept back."""
        if self._diverted:
            self._send_what_is_due()

    def _segment(self, connection: Connection, flags: str, acknowledged: int, data: bytes = b"") -> bytes:
        numbers = {"seq": connection.sequence, "ack": acknowledged}
        tcp = TCP(sport=connection.port, dport=PORT, flags=flags, window=65535, **numbers)
        return bytes(
            Ether(src=self._mac, dst=self._service_mac) / IP(src=self._address, dst=self._service) / tcp / data
        )


def main(mac: str, address: str, service: str) -> None:
    client = LateClient(mac, address, service)
    client.find_service()
    print(json.dumps({"event": "ready"}), flush=True)
    while True:
        client.open_two()
        client.turn(EVERY_S)
        if select.select([sys.stdin], [], [], 0)[0]:
            word = sys.stdin.readline().strip()
            print(json.dumps({"event": word, **client.seen()}), flush=True)
            if word != "seen":
                return


if __name__ == "__main__":
    main(*sys.argv[1:])
