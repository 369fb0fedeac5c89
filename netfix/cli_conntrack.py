"""`netfix conntrack`: what this host's connection table says of an address."""

from collections.abc import Sequence
from dataclasses import asdict

import click

from .cli_common import Result, Runner, answer, as_json_option, table
from .conntrack import NetlinkConnectionTable
from .conntrack_entry import ASSURED, DST_NAT, SEEN_REPLY, SRC_NAT, TCP, TCP_STATES, Connection, Flow

_FLAGS = {SEEN_REPLY: "answered", ASSURED: "assured", SRC_NAT: "source-nat", DST_NAT: "destination-nat"}


@click.command("conntrack")
@click.argument("addresses", nargs=-1, required=True, metavar="ADDRESS...")
@as_json_option
@click.pass_obj
def conntrack_command(run: Runner, *, addresses: Sequence[str], as_json: bool) -> None:
    """List the tracked connections that name an ADDRESS: what a stateful firewall and NAT know of a service.

    They move with a service. None means that this host does not track, or that the address has no connections.

    \b
    Examples:
      netfix conntrack 192.0.2.10
      netfix conntrack 192.0.2.10 2001:db8::10 --json
    """

    async def work() -> Result:
        connections = NetlinkConnectionTable()
        try:
            tracking = await connections.tracks()
            found = await connections.connections(addresses)
        finally:
            connections.close()
        return {"tracking": tracking, "connections": [_plain(each) for each in found]}

    def render(result: Result) -> None:
        rows = [
            (each["protocol"], each["state"], _flow(each["original"]), _flow(each["reply"]), " ".join(each["flags"]))
            for each in result["connections"]
        ]
        caption = f"{len(rows)} connections" if result["tracking"] else "this host tracks no connections"
        table(("protocol", "state", "from → to", "answers from → to", "flags"), rows, caption)

    answer(run, work, render, as_json)


def _plain(connection: Connection) -> Result:
    tcp = connection.tcp
    return {
        "protocol": "tcp" if connection.protocol == TCP else "udp",
        "state": TCP_STATES[tcp.state] if tcp and tcp.state < len(TCP_STATES) else "",
        "original": connection.original._asdict(),
        "reply": connection.reply._asdict(),
        "flags": [name for bit, name in _FLAGS.items() if connection.status & bit],
        **{name: asdict(connection)[name] for name in ("timeout_s", "mark", "zone")},
    }


def _flow(values: Result) -> str:
    def end(address: str, port: int) -> str:
        return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"

    flow = Flow(**values)
    return f"{end(flow.source, flow.source_port)} → {end(flow.destination, flow.destination_port)}"
