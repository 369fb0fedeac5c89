"""The catalogue of real services is whole: each has clients, an address of its own and a page with what it needs."""

from __future__ import annotations

from importlib import import_module
from ipaddress import ip_address
from pathlib import Path

import pytest

from labs.catalogue import SERVICES

PAGES = Path(__file__).parents[3] / "docs" / "services"


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_has_clients_and_a_page(name: str) -> None:
    service = SERVICES[name]
    sessions = import_module(f"labs.clients.{name}").sessions(service.address, service.port, "/nowhere")
    assert sum(session.connections for session in sessions) >= 6
    assert f"Needed: {service.needed}." in (PAGES / f"{name}.md").read_text()
    assert f"({name}.md) | {service.needed} |" in (PAGES / "README.md").read_text()


def test_no_page_is_left_over() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} - {"README", "xonotic"} == set(SERVICES)


def test_each_has_an_address_of_its_own() -> None:
    addresses = [ip_address(service.address) for service in SERVICES.values()]
    assert len(set(addresses)) == len(addresses)
