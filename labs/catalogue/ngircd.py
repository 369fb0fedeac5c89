"""ngIRCd, an IRC server."""

from __future__ import annotations

from labs.catalogue.base import Service

SERVICE = Service(
    name="ngircd",
    address="192.0.2.218",
    port=6667,
    user="irc",
    command=("ngircd", "--nodaemon", "--config", "@DATA@/ngircd.conf"),
    files={
        "ngircd.conf": """\
[Global]
Name = irc.lab.example
Info = a server that moves
Listen = @ADDRESS@
Ports = @PORT@
MotdPhrase = welcome
[Limits]
MaxConnectionsIP = 0
MaxPenaltyTime = 0
PingTimeout = 3
PongTimeout = 20
[Options]
DNS = no
Ident = no
PAM = no
""",
    },
    needed="nothing",
)
