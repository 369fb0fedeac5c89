"""The contract of `AddressMover`, over real ways (a segment, a router's table, a script) and the fake."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from coordinator.agent.movers import run_command
from netfix.announce import announcement_frames, probe_frames
from netfix.errors import NetfixError
from netfix.frames import PacketFramePort
from netfix.movers.base import AddressMover, MoverFailedError, MovingAddress, Ran, Role
from netfix.movers.fake import FakeMover, FakeWay
from netfix.movers.hook import HookMove, HookMover
from netfix.movers.l2 import Announcement, L2Mover
from netfix.movers.route import RouteMover, Router
from netfix.neighbours import RouteNeighbourhood
from tests.contract.netfix_segment import PEER, SERVICE, SERVICE6, Namespace

ROLES: tuple[Role, Role] = ("source", "destination")
MACS: dict[Role, str] = {"source": "02:00:00:00:00:11", "destination": "02:00:00:00:00:12"}
OWN: dict[Role, str] = {"source": "192.0.2.11", "destination": "192.0.2.12"}
OWN6: dict[Role, str] = {"source": "2001:db8::11", "destination": "2001:db8::12"}
ADDRESSES = [
    MovingAddress(SERVICE, 24, OWN["source"], OWN["destination"]),
    MovingAddress(SERVICE6, 64, OWN6["source"], OWN6["destination"]),
]
HOOK = """#!/bin/sh -e
test ! -e {folder}/broken || {{ echo "error: told to fail" >&2; exit 7; }}
here={folder}/$LIVEMOVE_ROLE-$LIVEMOVE_ADDRESS
case "$LIVEMOVE_ACTION-$LIVEMOVE_ROLE" in
    divert-destination | back-source) touch "$here" ;;
    divert-source | back-destination) rm -f "$here" ;;
esac
"""


def ip(namespace: Namespace, *commands: str) -> str:
    enter = ["nsenter", f"--net={namespace.namespace}", "ip"]
    return "".join(
        subprocess.run([*enter, *each.split()], check=True, capture_output=True, text=True).stdout for each in commands
    )


class Way:
    """A way with both its ends. `drawing`: the roles whose hosts draw the packets of all addresses; `breaks` makes the
    source's and the destination's next verb fail that has something to do, `mends` undoes that."""

    ends: Mapping[Role, AddressMover]
    drawing: Callable[[], set[Role]]
    breaks: Callable[[], object]
    mends: Callable[[], object]

    async def divert(self) -> None:
        await self.ends["destination"].divert()
        await self.ends["source"].divert()

    async def back(self) -> None:
        await self.ends["destination"].back()
        await self.ends["source"].back()


async def fake(_: AsyncExitStack, __: Path) -> Way:
    made, shared = Way(), FakeWay()
    ends = {role: FakeMover(role, shared) for role in ROLES}

    def fail(failing: bool) -> None:
        for end in ends.values():
            end.fail_next = failing

    made.ends, made.drawing = ends, shared.attracting.copy
    made.breaks, made.mends = lambda: fail(True), lambda: fail(False)
    return made


async def hook(_: AsyncExitStack, folder: Path) -> Way:
    made = Way()
    script = folder / "move-address"
    script.write_text(HOOK.format(folder=folder))
    script.chmod(0o755)
    for each in ADDRESSES:
        (folder / f"source-{each.address}").touch()
    move = HookMove("m1", "counter", "alpha", "beta", "eth0")
    made.ends = {role: HookMover(role, str(script), move, ADDRESSES, run_command, deadline_s=5) for role in ROLES}
    made.drawing = lambda: {
        role for role in ROLES if all((folder / f"{role}-{each.address}").exists() for each in ADDRESSES)
    }
    made.breaks, made.mends = (folder / "broken").touch, (folder / "broken").unlink
    return made


async def route(stack: AsyncExitStack, _: Path) -> Way:
    """A router with real tables; of ssh only the last argument, the command on the router, is run."""
    made, router = Way(), stack.enter_context(Namespace())
    ip(
        router,
        "link add eth0 type bridge",
        "link set eth0 up",
        "address add 192.0.2.1/24 dev eth0",
        "address add 2001:db8::1/64 nodad dev eth0",
        f"-4 route add {SERVICE}/32 via {OWN['source']}",
        f"-6 route add {SERVICE6}/128 via {OWN6['source']}",
    )

    async def run(argv: Sequence[str], environment: Mapping[str, str], deadline_s: float) -> Ran:
        enter = ["nsenter", f"--net={router.namespace}", "sh", "-c", argv[-1]]
        return await run_command(enter, environment, deadline_s)

    ends = {role: RouteMover(role, Router("192.0.2.1"), ADDRESSES, run, deadline_s=5) for role in ROLES}

    def drawing() -> set[Role]:
        said = ip(router, f"-4 route show {SERVICE}/32", f"-6 route show {SERVICE6}/128").split()
        hops = {said[at + 1] for at, word in enumerate(said) if word == "via"}
        return {role for role in ROLES if hops == {OWN[role], OWN6[role]}}

    made.ends, made.drawing = ends, drawing
    made.breaks, made.mends = lambda: ip(router, "link set eth0 down"), lambda: _up_again(router)
    return made


def _up_again(router: Namespace) -> None:
    ip(router, "link set eth0 up", "address replace 2001:db8::1/64 nodad dev eth0")


async def l2(stack: AsyncExitStack, _: Path) -> Way:
    """A peer that is also the segment's bridge, and two hosts; the destination has the addresses."""
    made, peer = Way(), stack.enter_context(Namespace())
    hosts: dict[Role, Namespace] = {role: stack.enter_context(Namespace()) for role in ROLES}
    ip(peer, "link add br0 type bridge", "link set br0 up", f"address add {PEER}/24 dev br0")
    ip(peer, "address add 2001:db8::1/64 nodad dev br0")
    for role, host in hosts.items():
        inside = host.namespace.split("/")[4]
        ip(peer, f"link add {role} type veth peer name eth0 address {MACS[role]} netns {inside}")
        ip(peer, f"link set {role} master br0 up")
        ip(
            host,
            "link set eth0 up",
            f"address add {OWN[role]}/24 dev eth0",
            f"address add {OWN6[role]}/64 nodad dev eth0",
        )
    for address, length, nodad in ((SERVICE, 24, ""), (SERVICE6, 64, "nodad")):
        ip(hosts["destination"], f"address add {address}/{length} {nodad} dev eth0")
        ip(peer, f"neighbour replace {address} lladdr {MACS['source']} nud stale dev br0")
    ends: dict[Role, AddressMover] = {}
    for role in ROLES:
        told = [
            Announcement(each, MACS[role], announcement_frames(each, MACS[role]), probe_frames(each, MACS[role]))
            for each in (SERVICE, SERVICE6)
        ]
        port = await hosts[role].call(lambda: PacketFramePort("eth0"))
        neighbourhood = await hosts[role].call(lambda: RouteNeighbourhood("eth0"))
        ends[role] = InNamespace(hosts[role], L2Mover(role, port, told, neighbourhood))

    def drawing() -> set[Role]:
        said = ip(peer, f"neighbour show {SERVICE}", f"neighbour show {SERVICE6}").split()
        known = {said[at + 1] for at, word in enumerate(said) if word == "lladdr"}
        return {role for role in ROLES if known == {MACS[role]}}

    def link(state: str) -> None:
        for host in hosts.values():
            ip(host, f"link set eth0 {state}")

    made.ends, made.drawing = ends, drawing
    made.breaks, made.mends = lambda: link("down"), lambda: link("up")
    return made


class InNamespace:
    """A mover whose verbs run in the thread of its namespace: what listens is opened there."""

    def __init__(self, namespace: Namespace, mover: AddressMover) -> None:
        self._namespace = namespace
        self._mover = mover

    async def divert(self) -> None:
        await self._namespace.run(self._mover.divert())

    async def back(self) -> None:
        await self._namespace.run(self._mover.back())

    async def released(self, peers: Collection[str]) -> tuple[str, ...]:
        return await self._namespace.run(self._mover.released(peers))

    async def hush(self) -> None:
        await self._namespace.run(self._mover.hush())

    async def finished(self) -> None:
        await self._namespace.run(self._mover.finished())

    async def close(self) -> None:
        await self._namespace.run(self._mover.close())


@pytest.fixture(params=[fake, hook, route, l2], ids=lambda make: make.__name__)
async def way(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Way]:
    async with AsyncExitStack() as stack:
        made: Way = await request.param(stack, tmp_path)
        yield made
        for end in made.ends.values():
            await end.close()


async def test_divert_brings_the_packets_to_the_destination(way: Way) -> None:
    assert way.drawing() == {"source"}
    await way.divert()
    await settled(way, {"destination"})


async def test_back_undoes_it(way: Way) -> None:
    await way.divert()
    await way.back()
    await settled(way, {"source"})


async def test_every_verb_may_be_repeated_and_back_needs_no_divert(way: Way) -> None:
    await way.back()
    await settled(way, {"source"})
    for _ in range(2):
        await way.divert()
    await settled(way, {"destination"})
    for _ in range(2):
        await way.back()
    await settled(way, {"source"})


async def test_the_source_gets_them_back_without_the_destination(way: Way) -> None:
    await way.divert()
    await way.ends["source"].back()
    await until(lambda: "source" in way.drawing())


async def test_released_leaves_them_there_and_has_nothing_to_warn_of(way: Way) -> None:
    await way.divert()
    for _ in range(2):
        assert [await way.ends[role].released({PEER, "2001:db8::1"}) for role in ROLES] == [(), ()]
    await settled(way, {"destination"})


async def test_a_failure_is_told_and_back_mends_it(way: Way) -> None:
    way.breaks()
    with pytest.raises(NetfixError):
        await way.divert()
    way.mends()
    await way.back()
    await settled(way, {"source"})


async def test_what_goes_on_can_be_waited_for_and_ended(way: Way) -> None:
    for end in way.ends.values():
        await end.hush()
        await end.finished()
    await way.divert()
    for end in way.ends.values():
        await end.finished()
    await way.divert()
    for end in way.ends.values():
        await end.hush()
        await end.hush()
        await end.close()
        await end.close()


async def settled(way: Way, roles: set[Role]) -> None:
    """A frame that was sent is taken in a moment later; everything else is so at once."""
    await until(lambda: way.drawing() == roles)


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(200):
        if holds():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never came to be")


# ---- a route


async def test_routes_are_told_as_they_are(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        made = await route(stack, tmp_path)
        source = made.ends["source"]
        assert isinstance(source, RouteMover)
        assert await source.routes() == {SERVICE: OWN["source"], SERVICE6: OWN6["source"]}
        await source.divert()
        assert await source.routes() == {SERVICE: OWN["destination"], SERVICE6: OWN6["destination"]}


async def test_a_route_that_is_missing_or_not_plain_is_told_as_such() -> None:
    with Namespace() as router:
        ip(router, "link add eth0 type bridge", "link set eth0 up", "address add 192.0.2.1/24 dev eth0")

        async def run(argv: Sequence[str], environment: Mapping[str, str], deadline_s: float) -> Ran:
            enter = ["nsenter", f"--net={router.namespace}", "sh", "-c", argv[-1]]
            return await run_command(enter, environment, deadline_s)

        mover = RouteMover("source", Router("r"), ADDRESSES[:1], run, deadline_s=5)
        assert await mover.routes() == {SERVICE: ""}
        assert await mover.released(()) == (f"the router r has no route for {SERVICE}, not {OWN['destination']}",)
        ip(router, f"route add {SERVICE}/32 via {OWN['source']} metric 7")
        assert await mover.routes() == {SERVICE: f"{SERVICE} via {OWN['source']} dev eth0 metric 7"}


async def test_ssh_is_asked_not_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Sequence[str]] = []

    async def run(argv: Sequence[str], environment: Mapping[str, str], deadline_s: float) -> Ran:
        ran.append(argv)
        return Ran(255, "Connection refused")

    router = Router("192.0.2.1", "admin", 2222, "/etc/key", "/etc/known")
    mover = RouteMover("source", router, ADDRESSES, run, deadline_s=5)
    with pytest.raises(MoverFailedError, match=r"192\.0\.2\.1 cannot be reached: Connection refused"):
        await mover.divert()
    (argv,) = ran
    assert argv[0] == "ssh"
    assert argv[-3:] == [
        "admin",
        "192.0.2.1",
        f"ip -4 route replace {SERVICE}/32 via 192.0.2.12 && ip -6 route replace {SERVICE6}/128 via 2001:db8::12",
    ]
    options = " ".join(argv)
    for option in ("BatchMode=yes", "StrictHostKeyChecking=yes", "IdentityFile=/etc/key", "-p 2222"):
        assert option in options


async def test_the_destination_never_writes_to_the_router() -> None:
    async def run(argv: Sequence[str], environment: Mapping[str, str], deadline_s: float) -> Ran:
        raise AssertionError(argv)

    mover = RouteMover("destination", Router("192.0.2.1"), ADDRESSES, run, deadline_s=5)
    await mover.divert()
    await mover.back()
    assert await mover.released(()) == ()


# ---- a hook


async def test_a_hook_is_told_what_the_manual_says(tmp_path: Path) -> None:
    script = tmp_path / "hook"
    script.write_text(f"#!/bin/sh\nenv | grep ^LIVEMOVE_ | sort >> {tmp_path}/told\n")
    script.chmod(0o755)
    move = HookMove("m1", "counter", "alpha", "beta", "eth0")
    await HookMover("source", str(script), move, ADDRESSES[:1], run_command, deadline_s=5).divert()
    told = dict(line.split("=", 1) for line in (tmp_path / "told").read_text().splitlines())
    assert told == {
        "LIVEMOVE_ACTION": "divert",
        "LIVEMOVE_ROLE": "source",
        "LIVEMOVE_ADDRESS": SERVICE,
        "LIVEMOVE_PREFIXLEN": "24",
        "LIVEMOVE_INTERFACE": "eth0",
        "LIVEMOVE_FROM": "alpha",
        "LIVEMOVE_TO": "beta",
        "LIVEMOVE_FROM_NEXT_HOP": "192.0.2.11",
        "LIVEMOVE_TO_NEXT_HOP": "192.0.2.12",
        "LIVEMOVE_WORKLOAD": "counter",
        "LIVEMOVE_MIGRATION": "m1",
    }
    manual = (Path(__file__).parents[2] / "docs/movers.md").read_text()
    assert all(f"`{name}`" in manual for name in told)


async def test_a_hook_that_takes_too_long_is_killed_with_what_it_started(tmp_path: Path) -> None:
    script, pids = tmp_path / "hook", tmp_path / "pids"
    script.write_text(f"#!/bin/sh\nsleep 1000 &\necho $$ $! > {pids}\nwait\n")
    script.chmod(0o755)
    move = HookMove("m1", "counter", "alpha", "beta", "eth0")
    mover = HookMover("source", str(script), move, ADDRESSES, run_command, deadline_s=0.5)
    with pytest.raises(MoverFailedError, match="not finished after"):
        await mover.divert()
    for pid in pids.read_text().split():
        await until(lambda pid=pid: _gone(pid))  # type: ignore[misc]


def _gone(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


async def test_a_hook_that_fails_says_why_and_at_the_end_only_warns(tmp_path: Path) -> None:
    script = tmp_path / "hook"
    script.write_text("#!/bin/sh\necho trying\necho 'error: no such address' >&2\nexit 3\n")
    script.chmod(0o755)
    move = HookMove("m1", "counter", "alpha", "beta", "eth0")
    mover = HookMover("source", str(script), move, ADDRESSES, run_command, deadline_s=5)
    words = f"{script} {{}} {SERVICE} as source: exit status 3: error: no such address"
    with pytest.raises(MoverFailedError) as caught:
        await mover.divert()
    assert caught.value.message == words.format("divert")
    assert await mover.released(()) == (words.format("released"),)
