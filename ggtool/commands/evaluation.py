"""`ggtool eval`: measure, keep every record as soon as it is whole, print the table."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

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
    records: list[EvalRecord] = []
    with progress_bar(quiet=quiet) as update:
        what = plan(request, notify, update)

        def relay(target: Target, stage: str, done: int, total: int) -> None:
            row = len(records) + 1
            update(f"[{row}/{len(what.targets)}] {target.label}: {stage}", done, total)

        try:
            for record in evaluate(what, relay):
                store.append(record)
                records.append(record)
                _note(record, quiet=quiet)
        except KeyboardInterrupt:
            raise MeasureError(f"stopped; the {len(records)} finished records are in {out}.") from None
    _print(records, as_json=as_json)
    if not quiet:
        notify(f"{len(records)} records appended to {out}.")
    failed = [record.label for record in records if record.failure]
    if failed:
        raise MeasureError(f"{len(failed)} of {len(records)} formats failed: {', '.join(failed)}.")


def _print(records: list[EvalRecord], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(record) for record in records], indent=2, allow_nan=False))
    else:
        stdout().print(eval_table(records))


def _note(record: EvalRecord, *, quiet: bool) -> None:
    result = f"ppl {record.perplexity.ppl:.4f}" if record.perplexity else "failed"
    stderr(quiet=quiet).print(f"{record.label}: {record.failure or result}", markup=False)
