"""Measure a plan while the user watches: a table that grows on a terminal, a line a row elsewhere."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

from rich.console import Group
from rich.text import Text

from ggtool.cli.cluster_board import ClusterBoard
from ggtool.cli.console import notifier
from ggtool.cli.live_view import LiveView
from ggtool.cli.records import outcome_line, stopped_by_user
from ggtool.evaluation.evaluate import evaluate, measure_rows
from ggtool.evaluation.plan import Plan
from ggtool.evaluation.record_keys import Known, find_known
from ggtool.evaluation.target import Target
from ggtool.report.table import eval_table
from ggtool.results.records import EvalRecord
from ggtool.results.store import ResultStore
from ggtool.system.schedule.work import Scheduler


def measure(what: Plan, out: Path, *, quiet: bool) -> list[EvalRecord]:
    """Measure what `out` does not hold yet of a plan, and return the records of all its targets.

    The parts of a record that is not whole yet are kept beside `out`, so that a run that is killed goes on from every number.
    """
    store, parts = ResultStore(out), _parts_beside(out)
    known, stored = find_known(what, [*parts, *store]), find_known(what, store)
    board = _Board(what, stored, quiet=quiet)
    with board.live(), stopped_by_user(out):
        records = evaluate(what, board.relay, known, parts.append)
        for target, record in zip(what.targets, records, strict=True):
            kept = is_kept(what, stored, target)
            if not kept:
                store.append(record)
            board.add(record, kept=kept)
    parts.path.unlink(missing_ok=True)
    notify = notifier(quiet=quiet)
    notify(f"{board.n_measured} records appended to {out}, {len(board.records) - board.n_measured} kept.")
    return board.records


def measure_on(scheduler: Scheduler, what: Plan, out: Path, *, quiet: bool) -> list[EvalRecord]:
    """Measure on a scheduler's nodes what `out` does not hold yet, and return the records of all targets, in their order.

    Records are appended when they are whole. Until then their parts are kept beside `out`, so that a run that is killed goes
    on from every number that was measured.
    """
    store, parts = ResultStore(out), _parts_beside(out)
    known = find_known(what, [*parts, *store], [node.facts for node in scheduler.nodes])
    kept = find_known(what, store, [node.facts for node in scheduler.nodes])
    board = ClusterBoard(len(what.targets), scheduler, quiet=quiet)
    whole: dict[Target, EvalRecord] = {}
    with board.live(), stopped_by_user(out):
        for measured in measure_rows(what, scheduler, board, known):
            if not measured.is_whole:
                if not measured.record.failure:
                    parts.append(measured.record)
                continue
            is_old = is_kept(what, kept, measured.target)
            if not is_old:
                store.append(measured.record)
            whole[measured.target] = measured.record
            board.add(measured.record, kept=is_old)
    parts.path.unlink(missing_ok=True)
    n_kept = sum(is_kept(what, kept, target) for target in what.targets)
    notifier(quiet=quiet)(f"{len(whole) - n_kept} records appended to {out}, {n_kept} kept.")
    return [whole[target] for target in what.targets]


def _parts_beside(out: Path) -> ResultStore:
    return ResultStore(out.with_name(f".{out.name}.parts"))


def is_kept(what: Plan, known: Known, target: Target) -> bool:
    """Whether a store has every number of a target."""
    return len(known[target]) == len(what.parts)


class _Board(LiveView):
    """What the user sees meanwhile: on a terminal a table that grows, elsewhere one line a row."""

    def __init__(self, what: Plan, known: Known, *, quiet: bool) -> None:
        super().__init__(quiet=quiet)
        self.records: list[EvalRecord] = []
        self.n_measured = 0
        self._n_rows = len(what.targets)
        self._n_left = sum(not is_kept(what, known, target) for target in what.targets)
        self._measured_s = 0.0
        self._row_started = time.monotonic()

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
