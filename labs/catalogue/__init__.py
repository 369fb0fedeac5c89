"""The real services that the lab moves, in the order in which it does."""

from __future__ import annotations

from labs.catalogue import redis
from labs.catalogue.base import Service

SERVICES: dict[str, Service] = {module.SERVICE.name: module.SERVICE for module in (redis,)}
