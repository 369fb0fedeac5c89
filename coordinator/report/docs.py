"""The pages of docs/ that are made from the code: ``python -m coordinator.report.docs`` in the project's folder.

Pure but for the last function. A test compares the pages with what is on disk.
"""

from __future__ import annotations

from pathlib import Path

from coordinator.checks import CHECKS
from coordinator.errors import EXIT_MEANINGS, LivemoveError
from coordinator.obstacles import OBSTACLES

_MADE = "<!-- Made from {source} by `python -m coordinator.report.docs`: edit there, then run it. -->\n"


def errors_page() -> str:
    """docs/errors.md: exit statuses, then every error of the tree."""
    lines = [
        "# Errors and exit statuses",
        _MADE.format(source="coordinator/errors.py"),
        "An error has a code that never changes, a message that says what and where, and a hint that says what to do.",
        "With `--json` they are in `error: {code, message, hint}`. The exit status says where the service is now.\n",
        "## Exit statuses\n",
        "| Status | Meaning |",
        "|---|---|",
        *(f"| {code.value} | {_cell(meaning)} |" for code, meaning in EXIT_MEANINGS.items()),
        "\n## Errors\n",
        "| Code | Exit status | Meaning | What to do |",
        "|---|---|---|---|",
    ]
    for code, kind in sorted(LivemoveError.registry.items()):
        meaning = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
        lines.append(f"| `{code}` | {kind.exit_code.value} | {_cell(meaning)} | {_cell(kind.default_hint)} |")
    return "\n".join(lines) + "\n"


def checks_page() -> str:
    """docs/checks.md: every finding of ``doctor`` and ``check``."""
    lines = [
        "# Findings of `livemove doctor` and `livemove check`",
        _MADE.format(source="coordinator/checks.py"),
        "An error forbids the move: `migrate` refuses with exit status 3 and touches nothing. A warning is told, and",
        "the move goes on. The codes never change. A host that cannot be asked is told with the code of the error,",
        "from [errors.md](errors.md).\n",
        "| Code | Severity | Meaning | What to do |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{each.code}` | {each.severity} | {_cell(each.meaning)} | {_cell(each.hint)} |" for each in CHECKS.values()
    ]
    lines += ["\n## What an agent finds in a workload\n", "Each says what to do about it.\n"]
    lines += ["| Code | Meaning |", "|---|---|"]
    lines += [f"| `{code}` | {_cell(meaning)} |" for code, meaning in OBSTACLES.items()]
    return "\n".join(lines) + "\n"


PAGES = {"errors.md": errors_page, "checks.md": checks_page}


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def write(folder: Path) -> None:
    """Write the pages into a folder."""
    for name, page in PAGES.items():
        (folder / name).write_text(page(), "utf-8")


if __name__ == "__main__":
    write(Path("docs"))
