"""`ggtool sweep`: an experiment that skips what the store has, and goes on where it was stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from rich.console import Group
from rich.live import Live
from rich.text import Text

from ggtool.atomic import refuse_unwritable
from ggtool.commands.console import notifier, progress_bar, stderr, stdout
from ggtool.commands.evaluation import outcome_line, print_records, refuse_failures, stopped_by_user
from ggtool.evaluate import evaluate
from ggtool.job import TASKS
from ggtool.keys import Known, find_known
from ggtool.plan import Plan, Request, Target, plan
from ggtool.report.table import eval_table
from ggtool.results import EvalRecord, ResultStore


def run(request: Request, out: Path, *, dry_run: bool, as_json: bool, quiet: bool) -> None:
    """Measure what `out` does not hold yet of `request`; MeasureError at the end if a format failed."""
    store = ResultStore(out)
    if not dry_run:
        refuse_unwritable(out)
    notify = notifier(quiet=quiet)
    with progress_bar(quiet=quiet) as update:
        what = plan(request, notify, update, dry=dry_run)
    if dry_run:
        _list_rows(what, find_known(what, store), as_json=as_json)
        return
    records = measure(what, out, quiet=quiet)
    print_records(records, as_json=as_json)
    refuse_failures(records)


def measure(what: Plan, out: Path, *, quiet: bool) -> list[EvalRecord]:
    """Measure what `out` does not hold yet of a plan, and return the records of all its targets."""
    store = ResultStore(out)
    known = find_known(what, store)
    board = _Board(what, known, quiet=quiet)
    with board.live(), stopped_by_user(board.records, out):
        for target, record in zip(what.targets, evaluate(what, board.relay, known), strict=True):
            kept = _is_kept(known, target)
            if not kept:
                store.append(record)
            board.add(record, kept=kept)
    notify = notifier(quiet=quiet)
    notify(f"{board.n_measured} records appended to {out}, {len(board.records) - board.n_measured} kept.")
    return board.records


def _is_kept(known: Known, target: Target) -> bool:
    return len(known[target]) == len(TASKS)


def _list_rows(what: Plan, known: Known, *, as_json: bool) -> None:
    left = {target.label: [task for task in TASKS if task not in known[target]] for target in what.targets}
    if as_json:
        print(json.dumps([{"format": name, "to_do": tasks} for name, tasks in left.items()], indent=2))
        return
    for name, tasks in left.items():
        stdout().print(f"{name}: {'to do: ' + ', '.join(tasks) if tasks else 'kept'}", markup=False)


class _Board:
    """What the user sees meanwhile: on a terminal a table that grows, elsewhere one line a row."""

    def __init__(self, what: Plan, known: Known, *, quiet: bool) -> None:
        self.records: list[EvalRecord] = []
        self.n_measured = 0
        self._n_rows = len(what.targets)
        self._n_left = sum(not _is_kept(known, target) for target in what.targets)
        self._measured_s = 0.0
        self._row_started = time.monotonic()
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

    def relay(self, target: Target, stage: str, done: int, total: int) -> None:
        """Show how far the running measurement is."""
        self._show(f"{self._place()} {target.label}: {stage} {done}/{total}{self._eta()}")

    def add(self, record: EvalRecord, *, kept: bool) -> None:
        """Take in a finished row."""
        if not kept:
            self.n_measured += 1
            self._n_left -= 1
            self._measured_s += time.monotonic() - self._row_started
        place = self._place()
        self.records.append(record)
        self._row_started = time.monotonic()
        line = f"{place} {outcome_line(record)}{' (kept)' if kept else ''}{self._eta()}"
        if self._shows_table:
            self._show(line)
        else:
            self._console.print(line, markup=False)

    def _place(self) -> str:
        return f"[{len(self.records) + 1}/{self._n_rows}]"

    def _eta(self) -> str:
        """Rows differ, so their mean so far is the estimate; there is none before the first."""
        if not self.n_measured or not self._n_left:
            return ""
        return f", ETA {timedelta(seconds=round(self._n_left * self._measured_s / self.n_measured))}"

    def _show(self, line: str) -> None:
        if self._shows_table:
            self._live.update(Group(eval_table(self.records), Text(line)), refresh=True)
