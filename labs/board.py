"""The lab's game as it goes on: where its server runs and what each player sees, live on a terminal."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

LOOK_EVERY_S = 0.25
UNSEEN_MS = 300
"""The engine's clients show a sign of trouble after so much silence (scr_drawnet in its cl_screen.c)."""


class Board:
    """On a terminal a table that is kept up to date by a thread, and elsewhere a line for each thing that is said."""

    def __init__(self, console: Console, look: Callable[[], list[dict[str, Any]]]) -> None:
        """`look` asks the players what they see; it must be safe to call from another thread."""
        self._console, self._look = console, look
        self._live = Live(console=console, transient=True, auto_refresh=False)
        self._lines = ["", ""]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_up_to_date, daemon=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._live.stop()

    def doing(self, text: str) -> None:
        """What goes on from now on."""
        self._lines = [text, ""]
        if not self._console.is_terminal:
            self._console.print(f"• {escape(text)}", highlight=False)

    def note(self, text: str) -> None:
        """A detail of it."""
        self._lines[1] = text
        if not self._console.is_terminal:
            self._console.print(f"    {escape(text)}", style="dim", highlight=False)

    def say(self, text: str, *, well: bool) -> None:
        """What came of it. It stays to be read."""
        mark = "[green]✓[/]" if well else "[red]✗[/]"
        self._console.print(f"{mark} {escape(text)}", highlight=False)

    def _keep_up_to_date(self) -> None:
        while not self._ended.is_set():
            try:
                players = self._look()
            except Exception:  # the players have ended, and whoever moves the game is about to hear of it
                return
            doing, note = self._lines
            self._live.update(Group(Text(doing, "bold"), table(players), Text(note, "dim")), refresh=True)
            self._ended.wait(LOOK_EVERY_S)


def table(players: list[dict[str, Any]]) -> Table:
    """One row a player."""
    rows = Table(box=None, padding=(0, 2, 0, 0))
    rows.add_column("player")
    for heading in ("ping\nms", "longest\nsilence ms", "snap-\nshots", "lost"):
        rows.add_column(heading, justify="right")
    for each in players:
        silence = each["longest_silence_ms"]
        rows.add_row(
            escape(each["name"]),
            f"{each['ping_ms']:.0f}",
            Text(f"{silence:.0f}", "" if silence < UNSEEN_MS else "yellow"),
            str(each["snapshots"]),
            Text(str(each["lost"]), "red" if each["lost"] else ""),
        )
        if each["trouble"]:
            rows.add_row(Text(f"  {each['trouble']}", "red"))
    return rows
