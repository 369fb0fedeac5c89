"""`netfix move`: an address alone, from one interface of this machine to another."""

from dataclasses import asdict

import click

from .announce import announcement_frames, probe_frames
from .cli_common import Result, Runner, answer, as_json_option
from .move import Place, move

_PLACE = "IF[@NETNS]"


@click.command("move")
@click.argument("address")
@click.option("--from", "origin", required=True, metavar=_PLACE, help="The interface that has it.")
@click.option("--to", "target", required=True, metavar=_PLACE, help="The interface that gets it.")
@as_json_option
@click.pass_obj
def move_command(run: Runner, *, address: str, origin: str, target: str, as_json: bool) -> None:
    """Move ADDRESS between two interfaces of this machine, and announce it from its new place.

    The address alone: sockets stay where they are, and between hosts nothing is moved (`livemove` does that). NETNS is
    a name as `ip netns` has it, or the path of a namespace. If ADDRESS cannot be added at the new place it is put back.
    Another host that answers for it afterwards is named, and is no error.

    \b
    Examples:
      netfix move 192.0.2.10 --from eth0 --to eth1
      netfix move 2001:db8::10 --from eth0 --to eth0@blue --json
    """

    async def work() -> Result:
        here, there = Place.parse(origin), Place.parse(target)
        moved = await move(address, here, there, announcement_frames, probe_frames)
        return {**asdict(moved), "from": str(here), "to": str(there)}

    def render(result: Result) -> None:
        click.echo(f"{result['address']}/{result['prefixlen']} is on {result['to']} now, at {result['mac']}")
        for mac in result["others"]:
            click.echo(f"{mac} answers for {result['address']} as well", err=True)

    answer(run, work, render, as_json)
