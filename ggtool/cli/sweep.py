"""`ggtool sweep`: an experiment that skips what the store has, and goes on where it was stopped.

A flag is None where it was not given, for then the experiment's file counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ggtool.cli.flags import (
    Calibration,
    CalibrationChunks,
    Device,
    Json,
    Model,
    Quiet,
    Revision,
)
from ggtool.errors import UsageError

if TYPE_CHECKING:
    from ggtool.evaluation.plan import Plan
    from ggtool.evaluation.record_keys import Known
    from ggtool.evaluation.request import EvalRequest


def sweep(
    file: Annotated[
        Path | None,
        typer.Argument(help="A .yaml file with the experiment's settings.", show_default=False),
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="study or gguf-ladder.", show_default=False)
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", "-b", help="Formats, as for eval.", show_default=False),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    corpus: Annotated[
        str | None, typer.Option("--corpus", help="A named corpus, or a text file.", show_default=False)
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(
            "--text-column",
            help="Where the text is in a .jsonl or .parquet row. Default: text.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", min=0, help="Rows of the corpus; 0, the default, takes all.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", min=0, help="Tokens of the text; 0, the default, takes all.", show_default=False
        ),
    ] = None,
    chunks: Annotated[
        int | None,
        typer.Option(
            "--chunks", min=0, help="Chunks to score; 0 takes all. Default: 40.", show_default=False
        ),
    ] = None,
    n_ctx: Annotated[
        int | None,
        typer.Option("--n-ctx", "-c", min=4, help="Tokens in a chunk. Default: 512.", show_default=False),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option("--protocol", help="llama (default), full or hf-stride.", show_default=False),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride", min=0, help="Step of hf-stride in tokens; 0 is half of --n-ctx.", show_default=False
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", help="A format, a .gguf path, or none. Default: hf-fp32.", show_default=False
        ),
    ] = None,
    calibration: Calibration = None,
    calibration_chunks: CalibrationChunks = None,
    repetitions: Annotated[
        int | None,
        typer.Option(
            "--repetitions", min=1, help="Timed rounds after warm-up. Default: 5.", show_default=False
        ),
    ] = None,
    speed_prompts: Annotated[
        str | None,
        typer.Option(
            "--speed-prompts", help="Prompt lengths to time as well. Default: 128,512.", show_default=False
        ),
    ] = None,
    speed_depths: Annotated[
        str | None,
        typer.Option(
            "--speed-depths",
            help="Depths to time generation at as well. Default: 0,512.",
            show_default=False,
        ),
    ] = None,
    speed_batches: Annotated[
        str | None,
        typer.Option(
            "--speed-batches",
            help="How many texts to continue together as well. Default: 4.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            min=1,
            help="Seconds one measurement may take before it counts as failed.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Records are kept here; what it has is not measured again.")
    ] = Path("results.jsonl"),
    threads: Annotated[
        int | None,
        typer.Option("--threads", "-t", min=0, help="CPU threads; 0, the default, takes all there are."),
    ] = None,
    device: Annotated[
        Device | None,
        typer.Option(
            "--device", case_sensitive=False, help="Where to run. Default: auto.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the rows, kept or to do, and measure nothing.")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a whole experiment; what was measured before is kept, and a stopped run goes on.

    The experiment is a list of formats, a YAML file or a preset; flags count before the file.

    Examples:
    [bold]ggtool sweep --preset study --model ./my-gpt2[/bold]

    [bold]ggtool sweep mine.yaml --chunks 0[/bold]
    """
    from ggtool.evaluation.experiment import find_preset, read_experiment, request_from
    from ggtool.evaluation.metrics.speed import parse_lengths
    from ggtool.formats import split_list

    if file is not None and preset is not None:
        raise UsageError("FILE and --preset exclude each other; pass one.")
    path = find_preset(preset) if preset is not None else file
    flags = {
        "backends": split_list(backend) if backend else None,
        "model": model,
        "revision": revision,
        "corpus": corpus,
        "text_column": text_column,
        "samples": samples,
        "max_tokens": max_tokens,
        "chunks": chunks,
        "n_ctx": n_ctx,
        "protocol": protocol.lower() if protocol else None,
        "stride": stride,
        "reference": reference,
        "calibration": calibration,
        "calibration_chunks": calibration_chunks,
        "repetitions": repetitions,
        "speed_prompts": None
        if speed_prompts is None
        else parse_lengths("--speed-prompts", speed_prompts, smallest=1),
        "speed_depths": None
        if speed_depths is None
        else parse_lengths("--speed-depths", speed_depths, smallest=0),
        "speed_batches": None
        if speed_batches is None
        else parse_lengths("--speed-batches", speed_batches, smallest=2),
        "timeout": timeout,
        "threads": threads,
        "device": device,
    }
    request = request_from(read_experiment(path) if path else {}, flags)
    _run(request, out, dry_run=dry_run, as_json=json_, quiet=quiet)


def _run(request: EvalRequest, out: Path, *, dry_run: bool, as_json: bool, quiet: bool) -> None:
    """Measure what `out` does not hold yet of `request`; MeasureError at the end if a format failed."""
    from ggtool.cli.board import measure
    from ggtool.cli.console import notifier, progress_bar
    from ggtool.cli.records import print_records, refuse_failures
    from ggtool.evaluation.plan import plan
    from ggtool.evaluation.record_keys import find_known
    from ggtool.results.store import ResultStore
    from ggtool.system.atomic import refuse_unwritable

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


def _list_rows(what: Plan, known: Known, *, as_json: bool) -> None:
    """Print which numbers of each target are still to be measured."""
    from ggtool.cli.console import stdout
    from ggtool.evaluation.jobs import TASKS

    left = {target.label: [task for task in TASKS if task not in known[target]] for target in what.targets}
    if as_json:
        print(json.dumps([{"format": name, "to_do": tasks} for name, tasks in left.items()], indent=2))
        return
    for name, tasks in left.items():
        stdout().print(f"{name}: {'to do: ' + ', '.join(tasks) if tasks else 'kept'}", markup=False)
