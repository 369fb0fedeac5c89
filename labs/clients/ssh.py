"""Clients of an SSH server, with the system's own ssh: shells on terminals, and data through a pipe."""

from __future__ import annotations

import asyncio
import random
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable

from labs.clients.sessions import Session, Stream, WrongAnswer, expect, main

LINE_BYTES = 4000
SHELL = "env PS1= PS2= bash --norc --noprofile --noediting -i"
OPTIONS = {
    "IdentitiesOnly": "yes",
    "StrictHostKeyChecking": "yes",
    "GlobalKnownHostsFile": "/dev/null",
    "ServerAliveInterval": "2",
    "ServerAliveCountMax": "30",
    "LogLevel": "ERROR",
}


class SshSession(Session):
    """One run of ssh, with a remote command, on a terminal there or not."""

    def __init__(self, address: str, port: int, folder: str) -> None:
        self._login = ["-p", str(port), "-i", f"{folder}/user_key", "-o", f"UserKnownHostsFile={folder}/known_hosts"]
        self._login += [f"root@{address}"]
        self._count = 0

    async def start(self, command: str, *options: str) -> None:
        settings = [word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}")]
        # It ends with us, and keeps nothing of ours open until then.
        argv = ["setpriv", "--pdeathsig", "TERM", "ssh", "-F", "none", *settings, *options, *self._login, command]
        process = await asyncio.create_subprocess_exec(*argv, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
        assert process.stdin and process.stdout
        self._process = process
        self._stream = Stream(process.stdout, process.stdin)

    async def start_shell(self) -> None:
        """An interactive shell on a terminal, that echoes nothing."""
        await self.start(SHELL, "-tt")
        self._stream.send(b"stty -echo -onlcr; echo begin\n")
        while await self._stream.line() != "begin":
            pass


class Counting(SshSession):
    """A shell that counts by itself, starting a process for every number."""

    interval_s = 0.0

    async def open(self) -> None:
        await self.start_shell()
        self._stream.send(b'i=0; while :; do i=$((i + 1)); echo "tick $i"; sleep 0.02; done\n')

    async def step(self) -> None:
        self._count += 1
        expect(await self._stream.line(), f"tick {self._count}", "the shell's count")


class Interactive(SshSession):
    """Somebody types, and the shell answers: it is the same shell, and it knows what it was told."""

    interval_s = 0.02

    async def open(self) -> None:
        await self.start_shell()
        self._stream.send(b'i=0; echo "$$ $(tty)"\n')
        self._where = await self._stream.line()
        if not self._where.endswith(("/dev/pts/0", "/dev/pts/1", "/dev/pts/2", "/dev/pts/3")):
            raise WrongAnswer(f"the shell has no terminal: {self._where}")

    async def step(self) -> None:
        self._count += 1
        self._stream.send(b'i=$((i + 1)); echo "$i $$ $(tty)"\n')
        expect(await self._stream.line(), f"{self._count} {self._where}", "the shell's answer")


class Piped(SshSession):
    """Data there and back through cat, without a terminal; keys are exchanged anew all the time."""

    async def open(self) -> None:
        await self.start("cat", "-T", "-o", "RekeyLimit=1M")

    async def step(self) -> None:
        line = random.randbytes(LINE_BYTES // 2).hex()
        self._stream.send(line.encode() + b"\n")
        expect(await self._stream.line(), line, "what came back")


def sessions(address: str, port: int, folder: str) -> list[Session]:
    kinds: list[Callable[[str, int, str], Session]] = [Counting, Counting, Interactive, Interactive, Piped, Piped]
    return [kind(address, port, folder) for kind in kinds]


if __name__ == "__main__":
    main(sessions)
