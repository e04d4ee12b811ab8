"""The flags of `ggtool eval`. Nothing heavy is imported before it is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ggtool.errors import UsageError
from ggtool.flags import (
    Calibration,
    CalibrationChunks,
    DeviceOption,
    Json,
    Model,
    Quiet,
    Revision,
    Threads,
)


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
    from ggtool.commands.evaluation import run
    from ggtool.formats import split_list
    from ggtool.metrics.speed import parse_lengths
    from ggtool.plan import Request

    request = Request(
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
    run(request, out, as_json=json_, quiet=quiet)


def _on_disk(paths: Sequence[Path]) -> list[str]:
    for path in paths:
        if not path.expanduser().exists():
            raise UsageError(f"there is no file or folder {path}; a format's name goes after --backend.")
    # As whole paths, so that a folder may be called like a format.
    return [str(path.expanduser().resolve()) for path in paths]


def _threads(asked: int) -> int:
    from ggtool.environment import usable_cpus

    return asked or usable_cpus()
