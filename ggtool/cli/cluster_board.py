"""What the user sees of a cluster at work: on a terminal a table of who does what, elsewhere one line a finished row."""

from __future__ import annotations

import time
from datetime import timedelta

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ggtool.cli.live_view import LiveView
from ggtool.cli.records import outcome_line
from ggtool.results.records import EvalRecord
from ggtool.system.schedule.work import Node, Scheduler, Work

# The table is drawn anew so often, at most.
_EVERY_S = 0.2


class ClusterBoard(LiveView):
    """A Watch that shows the nodes, what each does and how far it is, and how many of the rows are done.

    n_rows None: nothing that has rows is done.
    """

    def __init__(self, n_rows: int | None, scheduler: Scheduler, *, quiet: bool) -> None:
        super().__init__(quiet=quiet)
        self.records: list[EvalRecord] = []
        self.n_done = 0
        self._n_rows = n_rows
        self._n_kept = 0
        self._scheduler = scheduler
        self._doing: dict[str, dict[str, str]] = {}
        self._works_done: dict[str, int] = {}
        self._started_s = time.monotonic()
        self._shown_s = 0.0

    def running(self, work: Work, node: Node, stage: str, done: int, total: int) -> None:
        """Show how far a work is."""
        self._doing.setdefault(node.id, {})[work.key] = f"{work.label} ({stage} {done}/{total})"
        self._show()

    def idle(self, work: Work, node: Node) -> None:
        """Take a work from its node."""
        self._doing.get(node.id, {}).pop(work.key, None)
        self._works_done[node.id] = self._works_done.get(node.id, 0) + 1
        self._show()

    def note(self, message: str) -> None:
        """Print a line about a node or a lost worker."""
        self._console.print(message, markup=False, style="yellow")

    def add(self, record: EvalRecord, *, kept: bool) -> None:
        """Take in a finished row."""
        self.records.append(record)
        self._n_kept += kept
        self.finish(f"{outcome_line(record)}{' (kept)' if kept else f' on {_place(record)}'}")

    def finish(self, line: str) -> None:
        """Print the line of a finished row."""
        self.n_done += 1
        self._console.print(f"[{self.n_done}/{self._n_rows}] {line}{self._eta()}", markup=False)
        self._show()

    def _eta(self) -> str:
        measured, left = self.n_done - self._n_kept, (self._n_rows or 0) - self.n_done
        if not measured or not left:
            return ""
        passed = time.monotonic() - self._started_s
        return f", ETA {timedelta(seconds=round(left * passed / measured))}"

    def _show(self) -> None:
        if not self._shows_table or time.monotonic() - self._shown_s < _EVERY_S:
            return
        self._shown_s = time.monotonic()
        table = Table("node", "CPUs", "GPUs", "done", "doing", box=None, pad_edge=False)
        for node in self._scheduler.nodes:
            doing = "\n".join(self._doing.get(node.id, {}).values()) or "idle"
            table.add_row(
                node.name,
                f"{node.cpus:g}",
                f"{node.gpus:g}",
                str(self._works_done.get(node.id, 0)),
                Text(doing),
            )
        line = "" if self._n_rows is None else f"{self.n_done} of {self._n_rows} rows done{self._eta()}"
        self._live.update(Group(table, Text(line)), refresh=True)


def _place(record: EvalRecord) -> str:
    return f"node {record.environment.get('node', '?')}"
