"""`netfix sweep`: removes what an aborted migration left on this host."""

import sys
from dataclasses import asdict
from pathlib import Path

import click

from .address import AddressRecord, NetlinkAddressBook
from .announce import probe_frames
from .cli_common import Result, Runner, answer, as_json_option
from .errors import UsageError
from .frames import PacketFramePort
from .sweep import STATE_DIR, Remnant, remnants, remove

_PROBE_S = 0.5


@click.command("sweep")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    default=STATE_DIR,
    show_default=True,
    help="Where livemove's journals are: gates of migrations that have one are spared.",
)
@as_json_option
@click.pass_obj
def sweep_command(run: Runner, *, dry_run: bool, yes: bool, state_dir: Path, as_json: bool) -> None:
    """Remove rules, tables and addresses that an aborted migration left, livemove's or CRIU's.

    Nothing of a live migration is touched, nor of one that `livemove recover` can finish. Asks first; without a
    terminal it wants --yes.

    \b
    Examples:
      netfix sweep --dry-run
      netfix sweep
      netfix sweep --yes --json
    """

    async def work() -> Result:
        book = NetlinkAddressBook()

        async def elsewhere(record: AddressRecord) -> bool:
            mac = (await book.interface(record.interface)).mac
            if not mac.strip("0:"):
                return False  # loopback, a tunnel: there is no segment to ask
            frames = probe_frames(record.address, mac)
            port = PacketFramePort(record.interface)
            try:
                return bool(await port.who(frames, record.address, _PROBE_S))
            finally:
                port.close()

        try:
            found = await remnants(book, elsewhere, state_dir=state_dir)
            doomed = [remnant for remnant in found if not remnant.spared]
            removed = bool(doomed) and not dry_run and (yes or _agreed(doomed))
            for remnant in doomed if removed else ():
                await remove(remnant, book)
        finally:
            book.close()
        return {"remnants": [{**asdict(one), "removed": removed and not one.spared} for one in found]}

    def render(result: Result) -> None:
        for one in result["remnants"]:
            verb = "removed" if one["removed"] else "stays" if one["spared"] else "would be removed"
            click.echo(f"{verb}: {_sentence(one['kind'], one['subject'], one['detail'])}")
            for address in one["addresses"]:
                click.echo(f"  with {address['address']} on {address['interface']}: another host answers for it")
            if one["spared"]:
                click.echo(f"  because {one['spared']}")
        if not result["remnants"]:
            click.echo("nothing was left")

    answer(run, work, render, as_json)


def _sentence(kind: str, subject: str, detail: str) -> str:
    return detail if kind == "gate" else f"{subject}: {detail}"


def _agreed(doomed: list[Remnant]) -> bool:
    """Ask on the terminal. Raises UsageError where there is none."""
    if not sys.stdin.isatty():
        raise UsageError("there is no terminal to ask on", hint="say --yes, or --dry-run to see what would be removed")
    for one in doomed:
        click.echo(_sentence(one.kind, one.subject, one.detail), err=True)
        for record in one.addresses:
            click.echo(f"  with {record.address} on {record.interface}", err=True)
    return click.confirm(f"Remove these {len(doomed)}?", err=True)
