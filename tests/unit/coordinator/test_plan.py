"""The plan: ids that fit everywhere they go, and frames of the right host at each end."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.fakes import healthy_facts
from coordinator.plan import ID_LIMIT, TOKEN_LIMIT, image_space_bytes, make_plan, migration_id, next_hop
from coordinator.protocol import AddressMove, Deadlines, Endpoint, MigrationPlan
from coordinator.wire import decode, encode
from tests.unit.coordinator.samples import ADDRESS, ALPHA_MAC, BETA_MAC, CIDR, RUNNING, configuration

NOW = datetime(2026, 11, 20, 6, 15, tzinfo=UTC)


def frames(address: str, mac: str) -> tuple[bytes, ...]:
    return (f"{address} is at {mac}".encode(),)


def probes(address: str, mac: str) -> tuple[bytes, ...]:
    return (f"{mac} asks for {address}".encode(),)


def plan(folder: Path, **changes: object) -> MigrationPlan:
    config = configuration(folder)
    whole: dict[str, object] = {
        "migration": "20261120T061500-counter-3f9a",
        "workload": config.workload("counter"),
        "policy": config.policy,
        "source": config.host("alpha"),
        "destination": config.host("beta"),
        "source_facts": healthy_facts(11),
        "destination_facts": healthy_facts(12),
        "workload_facts": RUNNING,
        "frames": frames,
        "probes": probes,
    }
    return make_plan(**{**whole, **changes})  # type: ignore[arg-type]


def test_an_id_has_time_workload_and_token() -> None:
    assert migration_id("counter", NOW, "3f9a") == "20261120T061500-counter-3f9a"


def test_an_id_is_in_utc() -> None:
    assert migration_id("c", NOW.astimezone(timezone(timedelta(hours=-5))), "0").startswith("20261120T061500-")


@given(
    name=st.text(min_size=1),
    now=st.datetimes(min_value=datetime(2000, 1, 1), timezones=st.just(UTC)),
    token=st.text("0123456789abcdef", min_size=1, max_size=TOKEN_LIMIT),
)
def test_an_id_is_a_directory_and_a_table_name(name: str, now: datetime, token: str) -> None:
    made = migration_id(name, now, token)
    assert len(made) <= ID_LIMIT
    assert re.fullmatch(r"[0-9T]{15}-[A-Za-z0-9_.-]*-[0-9a-f]+", made)


def test_ids_sort_by_time() -> None:
    ids = [migration_id("z" if n % 2 else "a", NOW + timedelta(seconds=n), "ffff") for n in range(5)]
    assert ids == sorted(ids)


@pytest.mark.parametrize("source", [True, False])
def test_connections_are_tracked_where_the_destination_tracks(tmp_path: Path, source: bool) -> None:
    here = replace(healthy_facts(11), tracks_connections=source)
    there = replace(healthy_facts(12), tracks_connections=not source)
    assert plan(tmp_path, source_facts=here, destination_facts=there).track_connections is not source


def test_the_plan_of_a_move(tmp_path: Path) -> None:
    made = plan(tmp_path)
    assert made.source == Endpoint(name="alpha", interface="eth0", channel_address="192.0.2.11", mac=ALPHA_MAC)
    assert made.destination == Endpoint(name="beta", interface="eth0", channel_address="192.0.2.12", mac=BETA_MAC)
    assert made.addresses == (
        AddressMove(
            address=ADDRESS,
            prefixlen=24,
            announce_at_destination=frames(ADDRESS, BETA_MAC),
            announce_at_source=frames(ADDRESS, ALPHA_MAC),
            probe_at_destination=probes(ADDRESS, BETA_MAC),
            source_next_hop="192.0.2.11",
            destination_next_hop="192.0.2.12",
        ),
    )
    assert made.expected_pids == RUNNING.pids
    assert made.image_space_bytes == image_space_bytes(RUNNING.memory_bytes, len(RUNNING.sockets))
    assert made.deadlines == Deadlines()
    assert decode(MigrationPlan, encode(made)) == made


@pytest.mark.parametrize(
    ("addresses", "service", "hop"),
    [
        (("192.0.2.11/24",), "198.51.100.7/32", "192.0.2.11"),
        (("192.0.2.200/24", "192.0.2.11/24"), CIDR, "192.0.2.11"),
        (("192.0.2.11/24",), "2001:db8::200/64", ""),
        (("fe80::1/64", "2001:db8::11/64"), "2001:db8:1::7/128", "2001:db8::11"),
        ((), CIDR, ""),
    ],
)
def test_the_next_hop_is_an_address_that_stays(addresses: tuple[str, ...], service: str, hop: str) -> None:
    facts = healthy_facts(11)
    assert facts.interface is not None
    facts = replace(facts, interface=replace(facts.interface, addresses=addresses))
    assert next_hop(facts, service, (service, CIDR)) == hop
    assert next_hop(replace(facts, interface=None), service, (service,)) == ""


def test_image_space_has_room_for_more_than_the_pages() -> None:
    assert image_space_bytes(0, 0) == 64 << 20
    assert image_space_bytes(1000 << 20, 0) == (1164 << 20)
    assert image_space_bytes(0, 65_000) > 65_000 * 4096, "a page for the file of each connection"


def test_a_plan_needs_interfaces(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="host12 lacks its interface"):
        plan(tmp_path, destination_facts=replace(healthy_facts(12), interface=None))


def test_the_frame_builder_of_netfix_fits(tmp_path: Path) -> None:
    from netfix.announce import announcement_frames

    (move,) = plan(tmp_path, frames=announcement_frames).addresses
    assert all(frame[6:12] == bytes.fromhex(BETA_MAC.replace(":", "")) for frame in move.announce_at_destination)
