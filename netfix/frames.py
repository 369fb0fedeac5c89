"""Sends ready Ethernet frames on one interface, and listens who answers for an address. Standard library only.

A packet socket bypasses nftables in both directions: frames leave, and answers are heard, in every state of the gate.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

from .errors import UsageError, from_errno
from .namespace import Home
from .questions import acknowledger
from .unicast import parse_address

_ETH_P_ARP = 0x0806
_ETH_P_IPV6 = 0x86DD
_ETHERNET_BYTES = 14
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_ARP_PROBE_SENDER = bytes(4)
_NEIGHBOUR_ADVERTISEMENT = 136
_TARGET_LINK_LAYER_ADDRESS = 2
_MAX_FRAMES_BYTES = 2048
_MAX_BURST = 16
_MAX_REPEATS = 60
PROBES = 3
"""How often `who` asks, evenly over the first half of its time (RFC 5227 section 2.1.1: PROBE_NUM is 3)."""
_ASKINGS = 4


class FramePort(Protocol):
    """One interface of this host, as frames see it."""

    async def send(self, frames: Sequence[bytes]) -> None:
        """Send the frames at once, in order; does not wait. Undo: none. Raises NetfixError (interface down or
        gone)."""

    async def who(
        self, probe_frames: Sequence[bytes], address: str, timeout_s: float, *, settle_s: float | None = None
    ) -> set[str]:
        """Send the probes, listen for `timeout_s` seconds: the MACs (aa:bb:cc:dd:ee:ff) that claimed `address`.

        It listens on after the first answer, for a second one is what one wants to know of: to the end, or for
        `settle_s` seconds. This host does not hear itself.
        """

    async def ask(self, questions: Mapping[str, bytes], address: str, timeout_s: float) -> set[str]:
        """Ask neighbours in the name of `address` (`questions.question`): those that have answered within `timeout_s`
        seconds.

        Who has not answered is asked again, four times in all; it ends when everybody has. Raises NetfixError.
        """

    def close(self) -> None:
        """Let go of the sockets; idempotent."""


async def announce(
    port: FramePort,
    frames: Sequence[bytes],
    *,
    burst: int = 3,
    repeats: int = 4,
    interval_s: float = 0.25,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> None:
    """Send all frames `burst` times at once (0 to 16), then `repeats` times more (0 to 60), one `interval_s` apart.

    The burst goes out before the first await that waits. Inside a freeze, `await announce(port, frames, repeats=0)`;
    what follows may run in the background, as a task of `announce(port, frames, burst=0)`. By default the repeats
    last a second: a switch or a peer that missed the burst learns then. Raises UsageError for numbers out of range.
    """
    if not 0 <= burst <= _MAX_BURST or not 0 <= repeats <= _MAX_REPEATS or interval_s < 0:
        raise UsageError(f"announcing {burst} + {repeats} times every {interval_s} s is out of range")
    if burst:
        await port.send(list(frames) * burst)
    for _ in range(repeats):
        await sleep(interval_s)
        await port.send(frames)


def claimant(frame: bytes, address: str) -> str | None:
    """The MAC that claims `address` in this frame, if it is a frame that claims it. Pure.

    ARP: whatever names the address as its sender (RFC 5227 section 2.1.1 counts requests too). IPv6: a neighbour
    advertisement with the address as its target; the MAC is that of its option, or else the frame's sender.
    """
    if len(frame) < _ETHERNET_BYTES:
        return None
    (ethertype,) = struct.unpack_from("!H", frame, 12)
    wanted = parse_address(address)
    if ethertype == _ETH_P_ARP and wanted.version == 4:
        return _arp_claimant(frame, wanted.packed)
    if ethertype == _ETH_P_IPV6 and wanted.version == 6:
        return _advertiser(frame, wanted.packed)
    return None


def _arp_claimant(frame: bytes, wanted: bytes) -> str | None:
    if len(frame) < _ETHERNET_BYTES + _ARP.size:
        return None
    hardware, protocol, *sizes, _, sender_mac, sender, _, _ = _ARP.unpack_from(frame, _ETHERNET_BYTES)
    if (hardware, protocol, sizes) != (1, 0x0800, [6, 4]) or sender in (_ARP_PROBE_SENDER,):
        return None
    return str(sender_mac.hex(":")) if sender == wanted else None


def _advertiser(frame: bytes, wanted: bytes) -> str | None:
    icmp = _ETHERNET_BYTES + 40
    if len(frame) < icmp + 24 or frame[_ETHERNET_BYTES + 6] != socket.IPPROTO_ICMPV6:
        return None
    hop_limit = frame[_ETHERNET_BYTES + 7]
    if hop_limit != 255 or frame[icmp] != _NEIGHBOUR_ADVERTISEMENT or frame[icmp + 8 : icmp + 24] != wanted:
        return None
    offset = icmp + 24
    while offset + 8 <= len(frame):
        kind, length = frame[offset], frame[offset + 1] * 8
        if kind == _TARGET_LINK_LAYER_ADDRESS and length == 8:
            return frame[offset + 2 : offset + 8].hex(":")
        if length == 0:
            break
        offset += length
    return frame[6:12].hex(":")


class PacketFramePort:
    """An interface in the network namespace of the thread that makes it, through packet sockets. See `FramePort`."""

    def __init__(self, interface: str) -> None:
        """Open the sending socket; nothing is received on it.

        Raises NotPermittedError, NoSuchInterfaceError, KernelLacksError.
        """
        self._interface = interface
        self._home = Home()
        try:
            self._sender = self._open(0)
        except BaseException:
            self._home.close()
            raise

    async def send(self, frames: Sequence[bytes]) -> None:
        try:
            for frame in frames:
                self._sender.send(frame)
        except OSError as error:
            raise from_errno(error.errno or 0, f"sending on {self._interface}") from error

    async def who(
        self, probe_frames: Sequence[bytes], address: str, timeout_s: float, *, settle_s: float | None = None
    ) -> set[str]:
        found: set[str] = set()
        enough = asyncio.Event()

        def take(frame: bytes) -> None:
            mac = claimant(frame, address)
            if mac and not found and settle_s is not None:
                asyncio.get_running_loop().call_later(settle_s, enough.set)
            found.update(filter(None, [mac]))

        with self._listening(address, take) as heard:
            for pause_s in (*[timeout_s / (2 * PROBES)] * (PROBES - 1), timeout_s / (2 * PROBES) + timeout_s / 2):
                await self.send(probe_frames)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(enough.wait(), pause_s)
                    break
            heard()
        return found

    async def ask(self, questions: Mapping[str, bytes], address: str, timeout_s: float) -> set[str]:
        missing = set(questions)
        everybody = asyncio.Event()

        def take(frame: bytes) -> None:
            missing.discard(acknowledger(frame, address) or "")
            if not missing:
                everybody.set()

        with self._listening(address, take):
            for _ in range(_ASKINGS):
                if not missing:
                    break
                await self.send([questions[neighbour] for neighbour in sorted(missing)])
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(everybody.wait(), timeout_s / _ASKINGS)
        return set(questions) - missing

    @contextlib.contextmanager
    def _listening(self, address: str, take: Callable[[bytes], None]) -> Iterator[Callable[[], None]]:
        """Give every frame of the address's resolution protocol that comes in to `take`; what is given reads now."""
        listener = self._open(_ETH_P_ARP if parse_address(address).version == 4 else _ETH_P_IPV6)
        loop = asyncio.get_running_loop()

        def heard() -> None:
            with contextlib.suppress(BlockingIOError):
                while True:
                    frame, sender = listener.recvfrom(_MAX_FRAMES_BYTES)
                    if sender[2] != socket.PACKET_OUTGOING:
                        take(frame)

        try:
            loop.add_reader(listener.fileno(), heard)
            yield heard
        except OSError as error:
            raise from_errno(error.errno or 0, f"listening on {self._interface}") from error
        finally:
            loop.remove_reader(listener.fileno())
            listener.close()

    def close(self) -> None:
        self._sender.close()
        self._home.close()

    def _open(self, ethertype: int) -> socket.socket:
        try:
            # Protocol 0 until bound: an unbound packet socket would hear every interface.
            with self._home.entered():
                packet = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        except OSError as error:
            raise from_errno(error.errno or 0, "opening a packet socket") from error
        try:
            packet.bind((self._interface, ethertype))
        except OSError as error:
            packet.close()
            raise from_errno(error.errno or 0, f"interface {self._interface}") from error
        return packet


class FakeFramePort:
    """A port in memory, for tests: `sent` is what was sent, `answers` who claims which address, `deaf` the neighbours
    that do not answer when they are asked.

    `fail_next` is raised by the next sending, which then does not happen.
    """

    def __init__(self, answers: Mapping[str, set[str]] | None = None, deaf: Collection[str] = ()) -> None:
        self.deaf = set(deaf)
        self.answers: dict[str, set[str]] = {
            str(parse_address(address)): set(macs) for address, macs in (answers or {}).items()
        }
        self.sent: list[bytes] = []
        self.fail_next: Exception | None = None
        self.closed = False

    async def send(self, frames: Sequence[bytes]) -> None:
        failure, self.fail_next = self.fail_next, None
        if failure is not None:
            raise failure
        self.sent += frames

    async def who(
        self, probe_frames: Sequence[bytes], address: str, timeout_s: float, *, settle_s: float | None = None
    ) -> set[str]:
        await self.send(probe_frames)
        return set(self.answers.get(str(parse_address(address)), set()))

    async def ask(self, questions: Mapping[str, bytes], address: str, timeout_s: float) -> set[str]:
        parse_address(address)
        if questions:
            await self.send(list(questions.values()))
        return set(questions) - self.deaf

    def close(self) -> None:
        self.closed = True
