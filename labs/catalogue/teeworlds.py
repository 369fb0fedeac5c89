"""A Teeworlds server, the smallest of games: 9 MB of memory, UDP alone."""

from __future__ import annotations

from labs.catalogue.base import Service

SERVICE = Service(
    name="teeworlds",
    address="192.0.2.220",
    port=8303,
    user="games",
    command=("/usr/games/teeworlds-server", "-f", "@DATA@/server.cfg"),
    environment={"HOME": "@DATA@"},
    files={
        "server.cfg": """\
bindaddr @ADDRESS@
sv_port @PORT@
sv_name "a game that moves"
sv_register 0
sv_map dm1
sv_max_clients_per_ip 16
sv_timelimit 0
sv_scorelimit 0
""",
    },
    needed="nothing",
)
