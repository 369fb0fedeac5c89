"""A plain migration, as an operator would script it with runc and CRIU alone, done as fast as such a script can be.

    runc checkpoint --tcp-established      images on tmpfs, default options
    tar on the source | tar on the destination
    ip address del, ip address add, gratuitous ARP
    runc restore --tcp-established

In its favour: every program is started beforehand and waits for one line, as if the operator had all his SSH sessions
open; the copy is a pipe without encryption and without a network; the announcement is built beforehand and sent with no
more than a system call; and the destination sends no reset while the address is there and the service is not yet, which
would end the connection. What CRIU leaves behind on the source is swept afterwards, outside the measured time.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from labs.benchmarks.session import Service
from labs.commands import LabError
from labs.machines import Host
from netfix.announce import announcement_frames
from netfix.errors import NetfixError
from netfix.frames import PacketFramePort, announce
from netfix.leftovers import find_leftovers, remove_leftover

T = TypeVar("T")

DIRECTORY = "/run/plain"
LIMIT_S = 60.0
WAIT = 'read -r go && exec "$@"'
GUARD = "livemove_bench"
CLONE_NEWNET = 0x40000000


class TookTooLong(LabError):
    """A plain migration was not done in its time. What it left behind is undefined: take the lab down."""


@dataclass(frozen=True)
class PlainResult:
    """How long the parts of a plain migration took, one after the other, and how large its images were."""

    dump_ms: float
    copy_ms: float
    restore_ms: float
    total_ms: float
    image_bytes: int


class Step:
    """A program on a host, started and waiting for its cue."""

    def __init__(self, host: Host, argv: Sequence[str], *, output: Any = subprocess.DEVNULL, piped: Any = None) -> None:
        """With `piped`, a file, that is its input, and the cue for it is whatever arrives there."""
        self._argv = argv
        waiting = list(argv) if piped else ["sh", "-c", WAIT, "sh", *argv]
        self.process = host.popen(waiting, stdin=piped or subprocess.PIPE, stdout=output, stderr=subprocess.DEVNULL)

    def go(self) -> Self:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.close()
        return self

    def done(self, deadline: float) -> None:
        """Wait for its end, which must be a success."""
        try:
            status = self.process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            raise TookTooLong(f"not done in time: {' '.join(self._argv)}") from None
        if status != 0:
            raise LabError(f"exit status {status} from: {' '.join(self._argv)}")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                stream.close()


class PlainMove:
    """One plain migration. Undo of creating one: leaving it as a context. What CRIU leaves: `sweep`."""

    def __init__(self, service: Service, source: Host, destination: Host) -> None:
        """Start everything up to its cue; nothing of the service changes."""
        self._service, self._source, self._destination = service, source, destination
        self._undo = ExitStack()
        try:
            self._prepare()
        except BaseException:
            self._undo.close()
            raise

    def _prepare(self) -> None:
        for host in (self._source, self._destination):
            _shell(host, f"rm -rf {DIRECTORY}; mkdir -p {DIRECTORY}/images {DIRECTORY}/work")
            self._undo.callback(host.run, ["rm", "-rf", DIRECTORY], check=False)
        address, interface = self._service.workload.addresses[0], self._source.interface
        guard = f"add table ip {GUARD}; add chain ip {GUARD} out {{ type filter hook output priority 0; }}; "
        guard += f"add rule ip {GUARD} out ip saddr {self._service.address} tcp flags & rst != 0 drop"
        self._destination.run(["nft", guard])
        self._undo.callback(self._destination.run, ["nft", f"delete table ip {GUARD}"], check=False)
        images = ["--tcp-established", "--image-path", f"{DIRECTORY}/images", "--work-path", f"{DIRECTORY}/work"]
        container, bundle = self._service.workload.container, self._service.workload.bundle
        assert container and bundle
        # A pipe to us would become part of the container, and could not be restored again.
        restore = ["runc", "restore", "--detach", "--bundle", bundle, *images, container]
        self._dump = self._step(self._source, ["runc", "checkpoint", *images, container])
        tar = ["tar", "-C", f"{DIRECTORY}/images"]
        self._pack = self._step(self._source, [*tar, "-cf", "-", "."], output=subprocess.PIPE)
        self._unpack = self._step(self._destination, [*tar, "-xf", "-"], piped=self._pack.process.stdout)
        self._leave = self._step(self._source, ["ip", "address", "del", address, "dev", interface])
        self._arrive = self._step(self._destination, ["ip", "address", "add", address, "dev", interface])
        quiet = 'exec "$@" </dev/null >/dev/null 2>' + f"{DIRECTORY}/restore.log"
        self._restore = self._step(self._destination, ["sh", "-c", quiet, "sh", *restore])
        self._frames = announcement_frames(self._service.address, self._destination.mac)
        self._port = in_network_of(self._destination, lambda: PacketFramePort(interface))
        self._undo.callback(self._port.close)

    def _step(self, host: Host, argv: Sequence[str], **options: Any) -> Step:
        step = Step(host, argv, **options)
        self._undo.callback(step.close)
        return step

    def run(self, limit_s: float = LIMIT_S) -> PlainResult:
        """Move the service. Raises TookTooLong, and LabError if a step failed."""
        began = time.monotonic()
        deadline = began + limit_s
        self._dump.go().done(deadline)
        dumped = time.monotonic()
        self._pack.go().done(deadline)
        self._unpack.done(deadline)
        copied = time.monotonic()
        self._leave.go().done(deadline)
        self._arrive.go().done(deadline)
        asyncio.run(announce(self._port, self._frames, repeats=0))
        self._restore.go().done(deadline)
        ended = time.monotonic()
        size = _shell(self._destination, f"du -sb {DIRECTORY}/images | cut -f1")
        return PlainResult(
            dump_ms=_ms(dumped - began),
            copy_ms=_ms(copied - dumped),
            restore_ms=_ms(ended - copied),
            total_ms=_ms(ended - began),
            image_bytes=int(size),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()


def sweep(host: Host) -> None:
    """Remove the rules that CRIU left on a host: a service that comes back would be cut off from its clients."""

    async def remove_all() -> None:
        for leftover in await find_leftovers():
            if leftover.kind != "gate":
                await remove_leftover(leftover)

    try:
        in_network_of(host, lambda: asyncio.run(remove_all()))
    except NetfixError as error:
        raise LabError(f"{host.name}: what CRIU left cannot be swept: {error}") from error


def in_network_of(host: Host, what: Callable[[], T]) -> T:
    """Call it in a thread that has entered the host's network namespace. Sockets made there stay there."""

    def entered() -> T:
        descriptor = os.open(host.netns_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET) != 0:
                raise LabError(f"cannot enter {host.netns_path}: {os.strerror(ctypes.get_errno())}")
        finally:
            os.close(descriptor)
        return what()

    with ThreadPoolExecutor(1) as threads:
        return threads.submit(entered).result()


def _shell(host: Host, script: str) -> str:
    return host.run(["sh", "-c", script]).stdout


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
