"""Progress on standard error: a live display on a terminal, plain lines elsewhere, nothing with ``--quiet``."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from coordinator.events import Event
from coordinator.journal import Phase

#: What a finished move goes through, in order; the other phases are told when they come.
SHOWN_PHASES = tuple(phase for phase in Phase if phase not in (Phase.OPENED, Phase.ABORTED, Phase.ROLLED_BACK))
_MIB = 1024 * 1024


@dataclass(slots=True)
class ProgressState:
    """What the events add up to. Both halves go through the same phases; the first to enter one counts."""

    entered: dict[str, float] = field(default_factory=dict)
    sending: Event | None = None
    doing: dict[tuple[str, str], Event] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """Add an event."""
        if event.kind == "phase":
            self.entered.setdefault(event.name, event.at_ms)
            self.sending = None
        elif event.kind == "progress":
            self.sending = event if event.goes_on else None
        elif event.kind == "step":
            if event.state == "started":
                self.doing[event.host, event.name] = event
            else:
                self.doing.pop((event.host, event.name), None)

    def spans(self) -> list[tuple[str, float | None]]:
        """The phases entered so far, each with its milliseconds; ``None`` for the one that lasts."""
        starts = list(self.entered.items())
        ends = [at for _, at in starts[1:]]
        return [(name, end - start) for (name, start), end in zip(starts, ends, strict=False)] + [
            (name, None) for name, _ in starts[-1:]
        ]

    def display(self) -> Text:
        """The live display: the phases with their times, then what is under way."""
        text = Text()
        spans = dict(self.spans())
        names = [phase.value for phase in SHOWN_PHASES]
        for name in [*names, *(each for each in spans if each not in names)] if spans else []:
            if name not in spans:
                text.append(f"{name.lower()} ", "dim")
            elif (ms := spans[name]) is None:
                text.append(f"{name.lower()}… ", "bold cyan")
            else:
                text.append(f"{name.lower()} {ms:.0f} ms ", "green")
        if self.sending is not None:
            text.append(f"\n{amount(self.sending)}", "cyan")
        for event in self.doing.values():
            text.append(f"\n{event.host}: {event.name} {event.detail}".rstrip(), "dim")
        return text


def amount(event: Event) -> str:
    """How much of how much is done, if that is known: ``alpha: images 12.0 of 64.0 MiB``."""
    done, total, unit = str(event.done), str(event.total), event.unit
    if unit == "bytes":
        done, total, unit = f"{event.done / _MIB:.1f}", f"{event.total / _MIB:.1f}", "MiB"
    return f"{event.host}: {event.name} {done}{f' of {total}' if event.total else ''} {unit}"


def line_of(event: Event, *, verbose: bool) -> str | None:
    """An event as a plain line; ``None`` for what a log need not have."""
    if event.kind == "notice":
        return f"{event.host}: warning: {event.detail}" + (f" → {event.hint}" if event.hint else "")
    if event.kind == "phase":
        return f"{event.host}: {event.name.lower()} at {event.at_ms:.0f} ms" + (
            f": {event.detail}" if event.detail else ""
        )
    if event.kind == "progress":
        return None if event.goes_on else amount(event)
    if verbose:
        return f"{event.host}: {event.name} {event.state}" + (f": {event.detail}" if event.detail else "")
    return None


class Terminal:
    """An ``EventSink`` that shows what happens while it is entered. ``console`` writes to standard error."""

    def __init__(self, console: Console, *, quiet: bool = False, verbose: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._verbose = verbose
        self._state = ProgressState()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._quiet:
            self._live = Live(
                console=self._console, get_renderable=self._state.display, refresh_per_second=10, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, event: Event) -> None:
        """Take an event."""
        if self._quiet:
            return
        self._state.take(event)
        line = line_of(event, verbose=self._verbose)
        if line is not None and (self._live is None or event.kind == "notice" or self._verbose):
            self.say(line)

    def say(self, line: str) -> None:
        """Print a line, above the live display if there is one."""
        if not self._quiet:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
