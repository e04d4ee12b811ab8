"""`ggtool eval`: measure, keep every record as soon as it is whole, print the table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from ggtool.atomic import refuse_unwritable
from ggtool.commands.console import notifier, progress_bar, stderr, stdout
from ggtool.errors import MeasureError
from ggtool.evaluate import evaluate
from ggtool.plan import Request, Target, plan
from ggtool.report.table import eval_table
from ggtool.results import EvalRecord, ResultStore


def run(request: Request, out: Path, *, as_json: bool, quiet: bool) -> None:
    """Measure `request`, append its records to `out`; MeasureError at the end if a format failed."""
    notify = notifier(quiet=quiet)
    store = ResultStore(out)
    refuse_unwritable(out)
    records: list[EvalRecord] = []
    with progress_bar(quiet=quiet) as update:
        what = plan(request, notify, update)

        def relay(target: Target, stage: str, done: int, total: int) -> None:
            row = len(records) + 1
            update(f"[{row}/{len(what.targets)}] {target.label}: {stage}", done, total)

        with stopped_by_user(records, out):
            for record in evaluate(what, relay):
                store.append(record)
                records.append(record)
                _note(record, quiet=quiet)
    print_records(records, as_json=as_json)
    if not quiet:
        notify(f"{len(records)} records appended to {out}.")
    refuse_failures(records)


@contextmanager
def stopped_by_user(records: Sequence[EvalRecord], out: Path) -> Iterator[None]:
    """Turn Ctrl-C into one line that says where the finished records are."""
    try:
        yield
    except KeyboardInterrupt:
        raise MeasureError(
            f"stopped; the {len(records)} finished records are in {out}."
            if records
            else "stopped before anything was finished; nothing was written."
        ) from None


def print_records(records: Sequence[EvalRecord], *, as_json: bool) -> None:
    """Print records on stdout, as a table or as one JSON array."""
    if as_json:
        print(json.dumps([asdict(record) for record in records], indent=2, allow_nan=False))
    else:
        stdout().print(eval_table(records))


def refuse_failures(records: Sequence[EvalRecord]) -> None:
    """Raise MeasureError if a format failed, so that the command ends with exit code 1."""
    failed = [record.label for record in records if record.failure]
    if failed:
        raise MeasureError(f"{len(failed)} of {len(records)} formats failed: {', '.join(failed)}.")


def outcome_line(record: EvalRecord) -> str:
    """Return what a finished row says in one line."""
    result = f"ppl {record.perplexity.ppl:.4f}" if record.perplexity else "failed"
    return f"{record.label}: {record.failure or result}"


def _note(record: EvalRecord, *, quiet: bool) -> None:
    stderr(quiet=quiet).print(outcome_line(record), markup=False)
