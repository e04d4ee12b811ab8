"""The flags of `ggtool report` and `ggtool study`. Nothing heavy is imported before it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ggtool.flags import DeviceOption, Json, Model, Quiet, Revision, Threads


def report(
    results: Annotated[
        Path, typer.Argument(help="Records that eval, sweep or study wrote.", show_default=True)
    ] = Path("results.jsonl"),
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to.")] = Path("report"),
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="The checkpoint: its weights are shown, and only its records are taken. Default: the model of the newest record, without its weights.",
            show_default=False,
        ),
    ] = None,
    revision: Revision = None,
    gguf: Annotated[
        Path | None,
        typer.Option(
            "--gguf",
            help="The file to explain GGUF on. Default: one of --model that was measured.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            "--samples",
            help="Texts that study made. Default: samples.jsonl beside the results.",
            show_default=False,
        ),
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a report of measured formats: one HTML page that works offline, PDF, Markdown, figures.

    Examples:
    [bold]ggtool report results.jsonl -o report[/bold]

    [bold]ggtool report --model ./my-gpt2[/bold]
    """
    from ggtool.commands.report import run

    run(results, out, model, revision, gguf, samples, as_json=json_, quiet=quiet)


def study(
    model: Model = None,
    revision: Revision = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder for results and report; what it has is kept.")
    ] = Path("study"),
    corpus: Annotated[
        str | None,
        typer.Option(
            "--corpus", help="A named corpus, or a text file. Default: as for eval.", show_default=False
        ),
    ] = None,
    chunks: Annotated[
        int, typer.Option("--chunks", min=0, help="Chunks to score; 0 takes the whole text.")
    ] = 40,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", "-p", help="A text for every format to continue. Repeatable.", show_default=False
        ),
    ] = None,
    n_predict: Annotated[int, typer.Option("--n-predict", "-n", min=1, help="New tokens a text.")] = 40,
    seed: Annotated[int, typer.Option("--seed", "-s", min=0, help="Of the texts' random numbers.")] = 1,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds until a measurement counts as failed.")
    ] = 7200,
    threads: Threads = 0,
    device: DeviceOption = "auto",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the preset study, let each format write, and end with the report that answers its questions.

    A stopped study goes on where it was; a format that fails is a row with its reason and exit code 1.

    Example: [bold]ggtool study --model ./my-gpt2 -o study[/bold]
    """
    from ggtool.commands.study import run
    from ggtool.experiment import find_preset, read_experiment, request_from
    from ggtool.samples import PROMPTS, Settings

    flags = {
        "model": model,
        "revision": revision,
        "corpus": corpus,
        "chunks": chunks,
        "timeout": timeout,
        "threads": threads,
        "device": device,
    }
    request = request_from(read_experiment(find_preset("study")), flags)
    settings = Settings(prompts=tuple(prompt or PROMPTS), n_predict=n_predict, seed=seed)
    run(request, settings, out, as_json=json_, quiet=quiet)
