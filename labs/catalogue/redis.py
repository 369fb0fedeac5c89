"""redis, with every write in its append-only file."""

from __future__ import annotations

from labs.catalogue.base import Service

SERVICE = Service(
    name="redis",
    address="192.0.2.210",
    port=6379,
    user="redis",
    command=("redis-server", "@DATA@/redis.conf"),
    files={
        "redis.conf": """\
bind @ADDRESS@
port @PORT@
protected-mode no
dir @DATA@
daemonize no
save ""
appendonly yes
appendfsync everysec
# The clients have it read the file again at the end.
enable-debug-command yes
""",
    },
    needed="nothing",
)
