"""`ggtool eval`: measure, keep every record as soon as it is whole, print the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ggtool.cli.flags import (
    Calibration,
    CalibrationChunks,
    DeviceOption,
    Json,
    Model,
    Quiet,
    Revision,
    Threads,
)
from ggtool.errors import UsageError

if TYPE_CHECKING:
    from ggtool.evaluation.request import EvalRequest


def eval_(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Models on disk: .gguf files, and folders that `ggtool quantize` made.",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            "-b",
            help="Formats, e.g. hf-fp32,bnb-nf4,gguf-q4_k_m, or models on disk. Repeatable, comma lists.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            "--corpus",
            help="wikitext2, wikitext103, ptb, wikipedia, or a .txt, .jsonl or .parquet file. Default: wikitext2; the bundled held-out text for the bundled model.",
            show_default=False,
        ),
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
        int, typer.Option("--samples", min=0, help="Rows of the corpus; 0 takes all, 3000 of wikipedia.")
    ] = 0,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=0, help="Tokens of the text to take; 0 takes all.")
    ] = 0,
    chunks: Annotated[
        int, typer.Option("--chunks", min=0, help="Chunks to score; 0 takes the whole text.")
    ] = 40,
    n_ctx: Annotated[int, typer.Option("--n-ctx", "-c", min=4, help="Tokens in a chunk.")] = 512,
    protocol: Annotated[
        str, typer.Option("--protocol", help="How the text is cut and scored: llama, full or hf-stride.")
    ] = "llama",
    stride: Annotated[
        int, typer.Option("--stride", min=0, help="Step of hf-stride in tokens; 0 is half of --n-ctx.")
    ] = 0,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            help="What predictions are compared with: a format, a .gguf path, or none. Default: hf-fp32.",
            show_default=False,
        ),
    ] = None,
    calibration: Calibration = None,
    calibration_chunks: CalibrationChunks = None,
    repetitions: Annotated[int, typer.Option("--repetitions", min=1, help="Timed rounds after warm-up.")] = 5,
    speed_prompts: Annotated[
        str, typer.Option("--speed-prompts", help="Prompt lengths to time as well; cut to --n-ctx.")
    ] = "128,512",
    speed_depths: Annotated[
        str,
        typer.Option(
            "--speed-depths", help="Depths to time generation at as well; cut to --n-ctx. '' times none."
        ),
    ] = "0,512",
    speed_batches: Annotated[
        str, typer.Option("--speed-batches", help="How many texts to continue together as well.")
    ] = "4",
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
        Path, typer.Option("--out", "-o", help="Records are appended here, one JSON object a line.")
    ] = Path("results.jsonl"),
    threads: Threads = 0,
    device: DeviceOption = "auto",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity, speed and memory of any formats of one model, on the same tokens.

    Each number comes from a fresh process; a format that fails is one failed row and exit code 1.

    Examples:
    [bold]ggtool eval --model ./my-gpt2 --backend hf-fp32,scratch-int8,bnb-nf4,gguf-q4_k_m[/bold]

    [bold]ggtool eval ./my-gpt2-scratch-iq4[/bold]
    """
    from ggtool.evaluation.metrics.speed import parse_lengths
    from ggtool.evaluation.request import EvalRequest
    from ggtool.formats import split_list

    request = EvalRequest(
        backends=[*_on_disk(paths or ()), *split_list(backend or ())],
        model=model,
        revision=revision,
        corpus=corpus,
        text_column=text_column,
        samples=samples,
        max_tokens=max_tokens,
        protocol=protocol.lower(),
        n_ctx=n_ctx,
        stride=stride,
        n_chunks=chunks,
        reference=reference,
        calibration=calibration,
        calibration_chunks=calibration_chunks,
        device=device,
        threads=_threads(threads),
        repetitions=repetitions,
        speed_prompts=parse_lengths("--speed-prompts", speed_prompts, smallest=1),
        speed_depths=parse_lengths("--speed-depths", speed_depths, smallest=0),
        speed_batches=parse_lengths("--speed-batches", speed_batches, smallest=2),
        timeout_s=timeout,
    )
    _run(request, out, as_json=json_, quiet=quiet)


def _run(request: EvalRequest, out: Path, *, as_json: bool, quiet: bool) -> None:
    """Measure `request`, append its records to `out`; MeasureError at the end if a format failed."""
    from ggtool.cli.console import notifier, progress_bar, stderr
    from ggtool.cli.records import outcome_line, print_records, refuse_failures, stopped_by_user
    from ggtool.evaluation.evaluate import evaluate
    from ggtool.evaluation.plan import Target, plan
    from ggtool.results.records import EvalRecord
    from ggtool.results.store import ResultStore
    from ggtool.system.atomic import refuse_unwritable

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
                stderr(quiet=quiet).print(outcome_line(record), markup=False)
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


def _threads(asked: int) -> int:
    from ggtool.system.machine import usable_cpus

    return asked or usable_cpus()
