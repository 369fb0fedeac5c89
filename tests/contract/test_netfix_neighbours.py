"""The contract of `Neighbourhood`, over a kernel's routes and the fake."""

import subprocess
from collections.abc import AsyncIterator

import pytest

from netfix.errors import KernelRefusedError, NoSuchInterfaceError
from netfix.neighbours import MOST_PEERS, FakeNeighbourhood, Neighbourhood, RouteNeighbourhood, way_to
from tests.contract.netfix_segment import SERVICE, SERVICE6, Namespace

ROUTER, ROUTER6 = "192.0.2.1", "2001:db8::1"
FAR, FAR6 = "198.51.100.7", "2001:db8:9::7"
SETUP = f"""\
link add eth0 type veth peer name eth0-end
link set eth0-end up
link set eth0 up
link add eth1 type veth peer name eth1-end
link set eth1-end up
link set eth1 up
address add {SERVICE}/24 dev eth0
address add {SERVICE6}/64 nodad dev eth0
address add 203.0.113.2/24 dev eth1
route add default via {ROUTER}
route add default via {ROUTER6}
"""


@pytest.fixture(params=["routes", "fake"])
async def neighbourhood(request: pytest.FixtureRequest) -> AsyncIterator[Neighbourhood]:
    with Namespace() as host:
        made: Neighbourhood = FakeNeighbourhood({FAR: ROUTER, "198.51.100.8": ROUTER, FAR6: ROUTER6})
        if request.param == "routes":
            _ip(host, SETUP)
            made = await host.call(lambda: RouteNeighbourhood("eth0"))
        yield made
        made.close()


def _ip(namespace: Namespace, batch: str) -> None:
    enter = ["nsenter", f"--net={namespace.namespace}", "ip", "-batch", "-"]
    subprocess.run(enter, input=batch, text=True, check=True)


@pytest.mark.parametrize(
    ("address", "peers", "neighbours"),
    [
        (SERVICE, [], ()),
        (SERVICE, ["192.0.2.100"], ("192.0.2.100",)),
        (SERVICE, [FAR], (ROUTER,)),
        (SERVICE, [FAR, "198.51.100.8", FAR], (ROUTER,)),
        (SERVICE, ["192.0.2.100", FAR], ("192.0.2.100", ROUTER)),
        (SERVICE, ["192.0.2.100", "2001:db8::100"], ("192.0.2.100",)),
        (SERVICE6, ["2001:db8::100", FAR6, FAR], ("2001:db8::100", ROUTER6)),
    ],
)
async def test_who_packets_to_some_peers_go_to_first(
    neighbourhood: Neighbourhood, address: str, peers: list[str], neighbours: tuple[str, ...]
) -> None:
    assert sorted(await neighbourhood.towards(address, peers)) == sorted(neighbours)


async def test_closing_is_idempotent(neighbourhood: Neighbourhood) -> None:
    neighbourhood.close()
    neighbourhood.close()


async def test_by_another_interface_or_none_there_is_no_neighbour() -> None:
    with Namespace() as host:
        _ip(host, SETUP)
        made = await host.call(lambda: RouteNeighbourhood("eth0"))
        assert await made.towards(SERVICE, ["203.0.113.9", SERVICE]) == ()
        _ip(host, "route del default\nroute add unreachable 198.51.100.0/24\n")
        assert await made.towards(SERVICE, [FAR, "203.0.113.200", "8.8.8.8"]) == ()
        many = [f"192.0.2.{number % 200 + 20}" for number in range(300)] + [f"10.0.0.{n}" for n in range(256)]
        assert len(await made.towards(SERVICE, many)) <= MOST_PEERS
        _ip(host, "link del eth0\n")
        with pytest.raises(NoSuchInterfaceError):
            await made.towards(SERVICE, [FAR])
        made.close()


async def test_the_fake_can_fail_once() -> None:
    fake = FakeNeighbourhood()
    fake.fail_next = KernelRefusedError("no")
    with pytest.raises(KernelRefusedError):
        await fake.towards(SERVICE, [FAR])
    assert await fake.towards(SERVICE, [FAR]) == (FAR,)


async def test_the_way_to_an_address() -> None:
    with Namespace() as host:
        _ip(host, SETUP.replace(f"route add default via {ROUTER6}\n", ""))
        ways = [await host.call(lambda to=to: way_to(to)) for to in (FAR, "203.0.113.9", SERVICE6, FAR6)]  # type: ignore[misc]
    assert ways == ["eth0", "eth1", "lo", ""]
