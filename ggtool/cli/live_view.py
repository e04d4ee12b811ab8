"""What is drawn anew in one place while work goes on: on a terminal, and only there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.live import Live

from ggtool.cli.console import stderr


class LiveView:
    """A console for lines, and a part of the screen that `live` keeps while its block runs."""

    def __init__(self, *, quiet: bool) -> None:
        """Draw on stderr."""
        self._console = stderr(quiet=quiet)
        self._live = Live(console=self._console, transient=True, auto_refresh=False)
        self._shows_table = self._console.is_terminal and not quiet

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show the table as long as the block runs."""
        if not self._shows_table:
            yield
            return
        with self._live:
            yield
