"""memcached, with its worker threads."""

from __future__ import annotations

from labs.catalogue.base import Service

SERVICE = Service(
    name="memcached",
    address="192.0.2.211",
    port=11211,
    user="memcache",
    command=("memcached", "-l", "@ADDRESS@", "-p", "@PORT@", "-U", "0", "-m", "64", "-t", "4"),
    needed="nothing",
)
