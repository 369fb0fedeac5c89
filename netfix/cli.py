"""The command `netfix`: one function a command, which parses, calls, renders and gives the exit status.

Exit status: 0 done, 2 usage, 3 refused (with the reason and a hint on standard error), 130 interrupted. With `--json`
one object goes to standard output, on an error too: `{"error": {"code", "message", "hint"}}`.
"""

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import NoReturn

import click
import uvloop

from .address import NetlinkAddressBook
from .announce import announcement_frames, probe_frames
from .cli_common import Result, Runner, answer, as_json_option, table
from .cli_conntrack import conntrack_command
from .cli_hold import hold_command
from .cli_move import move_command
from .cli_sweep import sweep_command
from .errors import AddressConflictError
from .frames import PacketFramePort
from .frames import announce as send_announcement
from .gate import CLOSED, GateReport, NftGate, find_gates, remove_gate, state_name
from .inventory import SocketFinding, findings, other_sockets
from .leftovers import Leftover, find_leftovers
from .sockets import DiagSocketInventory, SocketRecord, of_addresses, owned_by, socket_inodes
from .unicast import parse_address

_interface = click.option(
    "--interface", required=True, metavar="IF", help="Network interface on the address's segment."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="livemove", prog_name="netfix")
def cli() -> None:
    """Addresses, announcements, gates and sockets of this host.

    netfix is the network half of livemove. It changes the host it runs on, needs root, and works alone.

    \b
    Examples:
      netfix who 192.0.2.10 --interface eth0
      netfix announce 192.0.2.10 --interface eth0
      netfix sockets --address 192.0.2.10 --json
      netfix conntrack 192.0.2.10
      netfix hold 192.0.2.10 --seconds 5
    """


@cli.command("sockets")
@click.option("--address", "addresses", multiple=True, metavar="A", help="Only sockets bound to A. Repeatable.")
@click.option("--wildcard", is_flag=True, help="With --address: those bound to all addresses too.")
@click.option("--pid", "pids", multiple=True, type=click.IntRange(min=1), help="Only sockets of this process.")
@as_json_option
@click.pass_obj
def sockets_command(
    run: Runner, *, addresses: Sequence[str], wildcard: bool, pids: Sequence[int], as_json: bool
) -> None:
    """List TCP and UDP sockets, and with --address what would become of them if the addresses moved.

    The findings are about the sockets listed, or with --pid about all sockets of those processes.

    \b
    Examples:
      netfix sockets
      netfix sockets --address 192.0.2.10 --wildcard
      netfix sockets --address 192.0.2.10 --wildcard --pid 4711 --json
    """

    async def work() -> Result:
        inventory = DiagSocketInventory()
        try:
            everything = await inventory.sockets()
        finally:
            inventory.close()
        records = everything
        inodes = socket_inodes(pids) if pids else set()
        if addresses:
            records = of_addresses(records, addresses, wildcard=wildcard)
        if pids:
            records = owned_by(records, inodes)
        found = []
        if addresses:
            owned = inodes or {record.inode for record in records}
            found = findings(everything, await other_sockets(), moving=addresses, inodes=owned)
        return {"sockets": [asdict(record) for record in records], "findings": [asdict(one) for one in found]}

    def render(result: Result) -> None:
        records = [SocketRecord(**record) for record in result["sockets"]]
        columns = ("protocol", "state", "local", "remote", "receive queue", "send queue", "inode")
        table(columns, map(_socket_row, records), f"{len(records)} sockets")
        for one in (SocketFinding(**finding) for finding in result["findings"]):
            click.echo(f"{'fatal' if one.fatal else 'note'}: {one.message} [{one.code}]\n  hint: {one.hint}")

    answer(run, work, render, as_json)


def _socket_row(record: SocketRecord) -> tuple[str, ...]:
    def end(address: str, port: int) -> str:
        return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"

    queues = (str(record.receive_queue_bytes), str(record.send_queue_bytes))
    local, remote = end(record.local, record.local_port), end(record.remote, record.remote_port)
    return (record.protocol, record.state, local, remote, *queues, str(record.inode))


@cli.command("who")
@click.argument("address")
@_interface
@click.option("--timeout", type=click.FloatRange(0.05, 60), default=1.0, show_default=True, help="Seconds.")
@as_json_option
@click.pass_obj
def who_command(run: Runner, *, address: str, interface: str, timeout: float, as_json: bool) -> None:
    """Ask the segment which host answers for ADDRESS; prints each MAC that does.

    The question teaches nobody anything. This host does not hear itself. Nobody answering is no error.

    \b
    Examples:
      netfix who 192.0.2.10 --interface eth0
      netfix who 2001:db8::10 --interface eth0 --timeout 0.5 --json
    """

    async def work() -> Result:
        wanted = str(parse_address(address))
        frames = probe_frames(wanted, await _mac(interface))
        port = PacketFramePort(interface)
        try:
            macs = await port.who(frames, wanted, timeout)
        finally:
            port.close()
        return {"address": wanted, "interface": interface, "macs": sorted(macs)}

    def render(result: Result) -> None:
        for mac in result["macs"]:
            click.echo(mac)
        if not result["macs"]:
            click.echo(f"nobody answered for {result['address']} within {timeout} s", err=True)

    answer(run, work, render, as_json)


@cli.command("announce")
@click.argument("address")
@_interface
@click.option("--burst", type=click.IntRange(1, 16), default=3, show_default=True, help="Times at once.")
@click.option(
    "--repeats", type=click.IntRange(0, 60), default=4, show_default=True, help="Times after it, 0.25 s apart."
)
@click.option("--anyway", is_flag=True, help="Even if this host does not have the address there.")
@as_json_option
@click.pass_obj
def announce_command(
    run: Runner, *, address: str, interface: str, burst: int, repeats: int, anyway: bool, as_json: bool
) -> None:
    """Tell the segment that ADDRESS is on this host now.

    \b
    Examples:
      netfix announce 192.0.2.10 --interface eth0
      netfix announce 2001:db8::10 --interface eth0 --repeats 20
    """

    async def work() -> Result:
        wanted = str(parse_address(address))
        book = NetlinkAddressBook()
        try:
            mac = (await book.interface(interface)).mac
            found = await book.find(wanted)
        finally:
            book.close()
        if not anyway and not any(record.interface == interface for record in found):
            raise AddressConflictError(
                f"this host does not have {wanted} on {interface}: announcing it would cut its users off",
                hint="add it first, or say --anyway",
            )
        frames = announcement_frames(wanted, mac)
        port = PacketFramePort(interface)
        try:
            await send_announcement(port, frames, burst=burst, repeats=repeats)
        finally:
            port.close()
        sent = len(frames) * (burst + repeats)
        return {"address": wanted, "interface": interface, "mac": mac, "frames": sent}

    def render(result: Result) -> None:
        click.echo(f"{result['address']} is at {result['mac']}: {result['frames']} frames on {interface}")

    answer(run, work, render, as_json)


@cli.group("gate")
def gate_group() -> None:
    """Show, close and open gates: whether this host answers for service addresses and lets their packets pass.

    \b
    Examples:
      netfix gate show
      netfix gate close maintenance 192.0.2.10 2001:db8::10
      netfix gate open maintenance
    """


@gate_group.command("show")
@as_json_option
@click.pass_obj
def gate_show_command(run: Runner, *, as_json: bool) -> None:
    """List the gates on this host."""

    async def work() -> Result:
        return {"gates": [_gate_object(report) for report in await find_gates()]}

    def render(result: Result) -> None:
        rows = [
            (gate["id"], gate["state"], " ".join(gate["addresses"]) or "(open: no rules)") for gate in result["gates"]
        ]
        table(("id", "state", "addresses"), rows, "no gates" if not rows else "")

    answer(run, work, render, as_json)


def _gate_object(report: GateReport) -> Result:
    state = report.state
    return {
        "id": report.migration_id,
        "state": state_name(state),
        "answering": state.answering,
        "passing": state.passing,
        "queue": state.queue,
        "addresses": list(report.addresses),
    }


@gate_group.command("close")
@click.argument("ident", metavar="ID")
@click.argument("addresses", nargs=-1, required=True, metavar="ADDRESS...")
@as_json_option
@click.pass_obj
def gate_close_command(run: Runner, *, ident: str, addresses: Sequence[str], as_json: bool) -> None:
    """Close gate ID: this host neither answers for the addresses nor lets their packets pass.

    Everything for them is dropped silently, and connections wait; `gate open ID` undoes it.
    """

    async def work() -> Result:
        gate = NftGate(ident, addresses)
        try:
            await gate.set(CLOSED)
        finally:
            gate.close()
        return {"id": ident, "state": "closed", "addresses": [str(parse_address(item)) for item in addresses]}

    answer(run, work, lambda result: click.echo(f"gate {ident} is closed"), as_json)


@gate_group.command("open")
@click.argument("ident", metavar="ID")
@as_json_option
@click.pass_obj
def gate_open_command(run: Runner, *, ident: str, as_json: bool) -> None:
    """Open gate ID by taking its rules away; fine if there is none."""

    async def work() -> Result:
        await remove_gate(ident)
        return {"id": ident, "state": "open", "addresses": []}

    answer(run, work, lambda result: click.echo(f"gate {ident} is open; its tables are gone"), as_json)


@cli.command("leftovers")
@click.option("--except", "except_for", metavar="ID", help="Leave out the gate of this migration.")
@as_json_option
@click.pass_obj
def leftovers_command(run: Runner, *, except_for: str | None, as_json: bool) -> None:
    """Name firewall rules that CRIU or an aborted migration left, and how to remove them. Removes nothing.

    \b
    Examples:
      netfix leftovers
      netfix leftovers --json
    """

    async def work() -> Result:
        return {"leftovers": [asdict(leftover) for leftover in await find_leftovers(except_for)]}

    def render(result: Result) -> None:
        for leftover in (Leftover(**item) for item in result["leftovers"]):
            where = " ".join(part for part in (leftover.family, leftover.table, leftover.chain) if part)
            click.echo(f"{leftover.kind}: {where}\n  {leftover.detail}\n  remove: {leftover.hint}")
        if not result["leftovers"]:
            click.echo("nothing was left")

    answer(run, work, render, as_json)


cli.add_command(conntrack_command)
cli.add_command(hold_command)
cli.add_command(move_command)
cli.add_command(sweep_command)


async def _mac(interface: str) -> str:
    book = NetlinkAddressBook()
    try:
        return (await book.interface(interface)).mac
    finally:
        book.close()


def main(arguments: Sequence[str] | None = None, runner: Runner | None = None) -> NoReturn:
    """The entry point: run the command under uvloop (or under `runner`) and exit with its status."""
    try:
        status = cli.main(
            list(arguments) if arguments is not None else None,
            prog_name="netfix",
            standalone_mode=False,
            obj=runner or uvloop.run,
        )
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, asyncio.CancelledError, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
