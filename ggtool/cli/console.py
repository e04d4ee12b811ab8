"""Consoles: results on stdout, notes and progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ggtool.system.progress import StageProgress

# Wide enough for the evaluation table when the output is a file or a pipe.
_PIPED_WIDTH = 160


def stdout() -> Console:
    """Console for facts; without a terminal it is wide enough for every table."""
    return Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, soft_wrap=True, highlight=False)


def stderr(*, quiet: bool = False) -> Console:
    """Console for notes; quiet swallows them all."""
    return Console(stderr=True, quiet=quiet, soft_wrap=True, highlight=False)


def notifier(*, quiet: bool) -> Callable[[str], None]:
    """Return a function that prints one note on stderr. Text is printed as it is, never as markup."""
    console = stderr(quiet=quiet)

    def notify(message: str) -> None:
        console.print(message, markup=False, style="yellow")

    return notify


@contextmanager
def progress_bar(*, quiet: bool) -> Iterator[StageProgress]:
    """Yield update(what, done, total): a live bar with an ETA on a terminal, nothing elsewhere."""
    console = stderr(quiet=quiet)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    ) as bar:
        task = bar.add_task("starting", total=None)
        shown = ""

        def update(what: str, done: int, total: int) -> None:
            nonlocal shown
            if what != shown:
                shown = what
                bar.reset(task, description=what, total=total)
            bar.update(task, completed=done, total=total)

        yield update
