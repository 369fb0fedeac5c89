"""node: a program of the lab's own, `server.js`, with HTTP, websockets, timers and threads."""

from __future__ import annotations

from pathlib import Path

from labs.catalogue.base import Service

SERVICE = Service(
    name="node",
    address="192.0.2.216",
    port=8080,
    user="www-data",
    command=("node", "@DATA@/server.js", "@ADDRESS@", "@PORT@", "@DATA@/lines"),
    files={"server.js": Path(__file__).with_name("server.js").read_text()},
    refused={"process": "IO_URING"},
    needed="io_uring refused (ENOSYS) by the seccomp profile",
)
