"""Clients of an IRC server: what is said in a channel or to somebody comes to all whom it is for, once and in order."""

from __future__ import annotations

from labs.clients.sessions import Session, Stream, expect, main

WELCOME, END_OF_NAMES, TOPIC = "001", "366", "332"


class Irc:
    """One client; RFC 2812."""

    def __init__(self, stream: Stream, nick: str) -> None:
        self._stream, self.nick = stream, nick

    @classmethod
    async def connect(cls, address: str, port: int, nick: str) -> Irc:
        irc = cls(await Stream.connect(address, port), nick)
        irc.send(f"NICK {nick}")
        irc.send(f"USER {nick} 0 * :{nick}")
        await irc.until(WELCOME)
        return irc

    def send(self, line: str) -> None:
        self._stream.send(f"{line}\r\n".encode())

    async def receive(self) -> tuple[str, str, str]:
        """Who, what, and what follows, of the next line that is not the server's question whether we are there."""
        while True:
            line = await self._stream.line()
            if not line.startswith("PING "):
                break
            self.send(f"PONG {line.removeprefix('PING ')}")
        who, what, *rest = line.split(" ", 2)
        return who.removeprefix(":").partition("!")[0], what, rest[0] if rest else ""

    async def until(self, command: str) -> None:
        """Take lines up to one with that command."""
        while (await self.receive())[1] != command:
            pass

    async def join(self, channel: str) -> None:
        self.send(f"JOIN {channel}")
        await self.until(END_OF_NAMES)


class Talk(Session):
    """Three people in a channel: one speaks, the others hear it; then one of them answers the first alone."""

    connections = 3

    def __init__(self, address: str, port: int, number: int) -> None:
        self._where, self._number, self._count = (address, port), number, 0
        self._channel = f"#lab{number}"

    async def open(self) -> None:
        self._people = [await Irc.connect(*self._where, f"{name}{self._number}") for name in ("ann", "bob", "cat")]
        for person in self._people:
            await person.join(self._channel)
        ann, bob, _ = self._people
        await ann.until("JOIN")
        await ann.until("JOIN")
        await bob.until("JOIN")

    async def step(self) -> None:
        self._count += 1
        speaker, *others = self._people
        speaker.send(f"PRIVMSG {self._channel} :line {self._count}")
        for each in others:
            due = (speaker.nick, "PRIVMSG", f"{self._channel} :line {self._count}")
            expect(await each.receive(), due, "what is said in the channel")
        others[0].send(f"PRIVMSG {speaker.nick} :answer {self._count}")
        due = (others[0].nick, "PRIVMSG", f"{speaker.nick} :answer {self._count}")
        expect(await speaker.receive(), due, "what is said to one alone")
        self._people.append(self._people.pop(0))

    async def finish(self) -> None:
        first, *others = self._people
        first.send(f"TOPIC {self._channel}")
        expect((await first.receive())[1], "331", "the topic, which nobody has set")
        for each in others:
            each.send(f"PART {self._channel}")
            await each.until("PART")


def sessions(address: str, port: int, folder: str) -> list[Session]:
    return [Talk(address, port, number) for number in range(6)]


if __name__ == "__main__":
    main(sessions)
