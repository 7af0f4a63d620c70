"""What commands show: JSON for scripts, columns for people, a progress bar for a terminal."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ..model import Progress

# A name with a control character in it must neither break a line nor steer the terminal.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}


def add_json(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help="answer in JSON, sizes in bytes")


def print_json(answer: object) -> None:
    print(json.dumps(answer, indent=2))


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Two columns: what, and how much of it."""
    facts = list(facts)
    width = max((len(name) for name, _ in facts), default=0)
    for name, value in facts:
        print(f"{name:<{width}}  {printable(value)}")


def facts_of(answer: dict[str, object]) -> list[tuple[str, str]]:
    """An answer's numbers and words, named as in JSON but for people; lists are left out."""
    facts = []
    for key, value in answer.items():
        if key.endswith("bytes") and isinstance(value, int):
            facts.append((key.removesuffix("_bytes"), size_text(value)))
        elif isinstance(value, bool):
            facts.append((key, "yes" if value else "no"))
        elif isinstance(value, int):
            facts.append((key.replace("_", " "), f"{value:,}"))
        elif not isinstance(value, (list, dict)):
            facts.append((key.replace("_", " "), str(value)))
    return facts


def size_text(size_bytes: int) -> str:
    if size_bytes < 1024:
        return f"{size_bytes} B"
    size = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def printable(text: str) -> str:
    return text.translate(_CONTROL)


@contextmanager
def progress_shown() -> Iterator[Progress]:
    """A place for a command to report to: a bar on standard error while that is a terminal, nothing otherwise."""
    if not sys.stderr.isatty():
        yield lambda _phase, _done, _total: None
        return
    from rich.console import Console  # slow to import, and most commands run without a terminal or are short
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task("starting", total=None)
    phase_shown = ""

    def show(phase: str, done: int, total: int | None) -> None:
        nonlocal task, phase_shown
        if phase != phase_shown:  # a task's total cannot be unset
            bar.remove_task(task)
            task, phase_shown = bar.add_task(printable(phase), total=total), phase
        bar.update(task, completed=done, total=total)

    with bar:
        yield show
