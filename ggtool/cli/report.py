"""`ggtool report`: gather what can be known of the model, write the report in all its forms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ggtool.cli.flags import (
    Json,
    Quiet,
    Revision,
)

SAMPLES = "samples.jsonl"


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
    from ggtool.cli.console import notifier
    from ggtool.cli.make_report import make_report
    from ggtool.errors import UsageError
    from ggtool.source.resolve import resolve

    if not results.is_file():
        if results.is_dir():
            raise UsageError(
                f"{results} is a folder; name the file that `ggtool sweep` or `eval` wrote, results.jsonl."
            )
        raise UsageError(f"there is no file {results}; measure with `ggtool sweep` or `ggtool study` first.")
    notify = notifier(quiet=quiet)
    source = resolve(model, revision, notify) if model else None
    if samples is None and (results.parent / SAMPLES).is_file():
        samples = results.parent / SAMPLES
    print_paths(make_report(results, out, source, gguf, samples, (), notify), as_json=json_)


def print_paths(paths: Sequence[Path], *, as_json: bool) -> None:
    """Print what was written: the three forms, and where the figures are."""
    from ggtool.cli.console import stdout

    if as_json:
        print(json.dumps([str(path) for path in paths], indent=2))
        return
    documents = [path for path in paths if path.parent == paths[0].parent]
    for path in documents:
        stdout().print(f"{path}  {path.stat().st_size / 1e6:.2f} MB", markup=False)
    n_figures = (len(paths) - len(documents)) // 2
    stdout().print(f"{paths[0].parent / 'figures'}  {n_figures} figures, .svg and .png", markup=False)
