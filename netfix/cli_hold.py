"""`netfix hold`: keeps what arrives for addresses, and lets it go again."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict

import click

from .cli_common import Result, Runner, answer, as_json_option
from .errors import KernelLacksError
from .gate import OPEN, NftGate, releasing
from .hold import NfqueueHold
from .hold_buffer import HoldLimits
from .unicast import parse_address


@click.command("hold")
@click.argument("addresses", nargs=-1, required=True, metavar="ADDRESS...")
@click.option(
    "--seconds", type=click.FloatRange(0.01, 3600), default=10.0, show_default=True, help="Let go after so long."
)
@click.option(
    "--packets", type=click.IntRange(1, 1 << 20), default=HoldLimits().packets, show_default=True, help="Most."
)
@as_json_option
@click.pass_obj
def hold_command(run: Runner, *, addresses: Sequence[str], seconds: float, packets: int, as_json: bool) -> None:
    """Keep what arrives for ADDRESS... and let it go in order, after some seconds or on Ctrl-C.

    For what takes a moment, such as the restart of a service: clients wait instead of being refused. What this host
    sends goes out. An SSH session to one of the addresses is held too, with its Ctrl-C.

    Should the command be killed, what comes for the addresses is dropped until `netfix sweep`.

    \b
    Examples:
      netfix hold 192.0.2.10
      netfix hold 192.0.2.10 2001:db8::10 --seconds 2.5 --json
    """

    async def work() -> Result:
        gate = NftGate(f"hold-{os.getpid()}", addresses)
        hold = NfqueueHold(HoldLimits(packets=packets))
        try:
            await hold.open()
            if hold.queue is None:
                raise KernelLacksError(
                    "this kernel cannot hold packets", hint="it needs NFQUEUE, and rules that use it"
                )
            try:
                await gate.set(releasing(hold.queue))
                await _interrupted_or(seconds)
            finally:
                # Also when cancelled: rules must not be left.
                report = await hold.release(lambda: gate.set(OPEN))
                await gate.remove()
        finally:
            hold.close()
            gate.close()
        return {"addresses": [str(parse_address(address)) for address in addresses], **asdict(report)}

    def render(result: Result) -> None:
        lost = result["dropped_udp"] + result["dropped_other"] + result["kernel_dropped"]
        click.echo(
            f"held {result['held_packets']} packets ({result['held_bytes']} bytes), "
            f"let go of {result['released'] + result['late']}, dropped {lost}"
        )

    answer(run, work, render, as_json)


async def _interrupted_or(seconds: float) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), seconds)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
