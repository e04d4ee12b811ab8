"""The flags of `ggtool eval` and `ggtool sweep`. Nothing heavy is imported before it is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ggtool.errors import UsageError
from ggtool.flags import (
    Calibration,
    CalibrationChunks,
    Device,
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
    from ggtool.commands.sweep import run
    from ggtool.experiment import find_preset, read_experiment, request_from
    from ggtool.formats import split_list
    from ggtool.metrics.speed import parse_lengths

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
    run(request, out, dry_run=dry_run, as_json=json_, quiet=quiet)


def _on_disk(paths: Sequence[Path]) -> list[str]:
    for path in paths:
        if not path.expanduser().exists():
            raise UsageError(f"there is no file or folder {path}; a format's name goes after --backend.")
    # As whole paths, so that a folder may be called like a format.
    return [str(path.expanduser().resolve()) for path in paths]


def _threads(asked: int) -> int:
    from ggtool.environment import usable_cpus

    return asked or usable_cpus()
