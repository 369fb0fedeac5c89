"""What is being done, told on standard error: live on a terminal, line by line into a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Steps:
    """Announces each step when it begins, shows that it goes on, and says how long it took."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        began = time.monotonic()
        live = self._console.is_terminal
        if not live:
            self._line("•", title)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True, disable=not live) as progress:
            progress.add_task(escape(title), total=None)
            try:
                yield
            except BaseException:
                self._line("[red]✗[/]", title)
                raise
        self._line("[green]✓[/]", f"{title}: {time.monotonic() - began:.1f} s")

    def note(self, text: str) -> None:
        """A detail of the step that is going on."""
        self._console.print(f"          {escape(text)}", style="dim", highlight=False)

    def _line(self, mark: str, text: str) -> None:
        elapsed = time.monotonic() - self._began
        self._console.print(f"[dim]{elapsed:5.1f} s[/] {mark} {escape(text)}", highlight=False)
