"""Shared by eval, sweep and study: print records; turn Ctrl-C and failed formats into one line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from ggtool.cli.console import stdout
from ggtool.errors import MeasureError
from ggtool.report.table import answered, eval_table
from ggtool.results.records import EvalRecord
from ggtool.results.store import ResultStore


@contextmanager
def stopped_by_user(out: Path) -> Iterator[None]:
    """Turn Ctrl-C into one line that says how many finished records the file `out` holds.

    The file is counted, not what the caller has taken in: Ctrl-C may come just after a record was appended.
    """
    try:
        yield
    except KeyboardInterrupt:
        n_finished = sum(1 for _ in ResultStore(out))
        raise MeasureError(
            f"stopped; finished records in {out}: {n_finished}."
            if n_finished
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
    """Return a finished record as one line: its perplexity, its answers to tasks."""
    result = f"ppl {record.perplexity.ppl:.4f}" if record.perplexity else "failed"
    tasks = [f"{task.task} {answered(record, task.task)}" for task in record.tasks]
    return f"{record.label}: {record.failure or ', '.join([result, *tasks])}"
