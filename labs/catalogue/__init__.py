"""The real services that the lab moves, in the order in which it does."""

from __future__ import annotations

from labs.catalogue import jvm, memcached, mosquitto, nginx, ngircd, node, postgresql, redis, ssh, teeworlds
from labs.catalogue.base import Service

_MODULES = (redis, memcached, nginx, postgresql, mosquitto, ssh, node, jvm, ngircd, teeworlds)

SERVICES: dict[str, Service] = {module.SERVICE.name: module.SERVICE for module in _MODULES}
