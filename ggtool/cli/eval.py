"""`ggtool eval`: measure, keep every record as soon as it is whole, print the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ggtool.cli.eval_flags import EvalFlags, takes_eval_flags
from ggtool.cli.flags import Json, Quiet
from ggtool.errors import UsageError

if TYPE_CHECKING:
    from ggtool.evaluation.request import EvalRequest


@takes_eval_flags
def eval_(
    flags: EvalFlags,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Models on disk: .gguf files, and folders that `ggtool quantize` made.",
            show_default=False,
        ),
    ] = None,
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Records are appended here, one JSON object a line.")
    ] = Path("results.jsonl"),
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity, speed and memory of any formats of one model, on the same tokens.

    Each number comes from a fresh process; a format that fails is one failed row and exit code 1.

    Examples:
    [bold]ggtool eval --model ./my-gpt2 --backend hf-fp32,scratch-int8,bnb-nf4,gguf-q4_k_m[/bold]

    [bold]ggtool eval ./my-gpt2-scratch-iq4[/bold]
    """
    from ggtool.evaluation.experiment import request_from

    settings = flags.settings()
    backends = [*_on_disk(paths or ()), *settings.get("backends", ())]
    request = request_from({}, {**settings, "backends": backends})
    _run(request, out, as_json=json_, quiet=quiet)


def _run(request: EvalRequest, out: Path, *, as_json: bool, quiet: bool) -> None:
    """Measure `request`, append its records to `out`; MeasureError at the end if a format failed."""
    from ggtool import api
    from ggtool.cli.console import notifier, progress_bar, stderr
    from ggtool.cli.records import outcome_line, print_records, refuse_failures, stopped_by_user
    from ggtool.results.records import EvalRecord

    notify, notes = notifier(quiet=quiet), stderr(quiet=quiet)

    def on_record(record: EvalRecord) -> None:
        notes.print(outcome_line(record), markup=False)

    with progress_bar(quiet=quiet) as update, stopped_by_user(out):
        records = api.evaluate(request, out, notify=notify, progress=update, on_record=on_record)
    print_records(records, as_json=as_json)
    if not quiet:
        notify(f"{len(records)} records appended to {out}.")
    refuse_failures(records)


def _on_disk(paths: Sequence[Path]) -> list[str]:
    for path in paths:
        if not path.expanduser().exists():
            raise UsageError(f"there is no file or folder {path}; a format's name goes after --backend.")
    # As whole paths, so that a folder may be called like a format.
    return [str(path.expanduser().resolve()) for path in paths]
