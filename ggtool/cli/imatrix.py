"""`ggtool imatrix`: run a model over a text and write how strongly the text uses each weight."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ggtool.cli.flags import DeviceOption, Force, Json, Quiet, Threads


def imatrix(
    path: Annotated[
        Path,
        typer.Argument(
            help="A .gguf file, best of full precision. With --gradient: a checkpoint's folder.",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path, typer.Option("--data", "-d", help="The calibration text, UTF-8.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("imatrix.gguf"),
    chunks: Annotated[int, typer.Option("--chunks", min=0, help="Chunks to run; 0 is the whole text.")] = 0,
    n_ctx: Annotated[int, typer.Option("--n-ctx", "-c", min=16, help="Tokens in a chunk.")] = 512,
    process_output: Annotated[
        bool, typer.Option("--process-output", help="Take the output matrix in, a tied one too.")
    ] = False,
    gradient: Annotated[
        bool,
        typer.Option(
            "--gradient",
            help="Weigh tokens by squared gradients of the predictions; PATH is then a checkpoint's folder.",
        ),
    ] = False,
    threads: Threads = 0,
    device: DeviceOption = "cpu",
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compute an importance matrix: how strongly a text uses each weight of a model.

    Examples:
    [bold]ggtool imatrix models/gpt2-F16.gguf --data text.txt -o gpt2-imatrix.gguf[/bold]

    [bold]ggtool imatrix ./my-gpt2 --gradient --data text.txt -o gpt2-imatrix.gguf[/bold]
    """
    from ggtool.backends import LoadOptions
    from ggtool.backends.device import choose_device
    from ggtool.calibration.gradient import compute_gradient_imatrix
    from ggtool.calibration.imatrix import compute_imatrix
    from ggtool.cli.console import notifier, progress_bar, stdout
    from ggtool.gguf.imatrix import write_imatrix
    from ggtool.source.resolve import resolve
    from ggtool.system.atomic import refuse_existing
    from ggtool.system.machine import usable_cpus

    refuse_existing(out, force=force)
    # "auto" is the CPU: the sums are made there, whatever computes the products.
    options = LoadOptions(n_ctx, threads or usable_cpus(), "cuda" if device == "cuda" else "cpu")
    with progress_bar(quiet=quiet) as update:
        if gradient:
            made = compute_gradient_imatrix(
                resolve(str(path), None, notifier(quiet=quiet)),
                data,
                n_ctx=n_ctx,
                n_chunks=chunks,
                output=process_output,
                device=choose_device(device),
                threads=options.threads,
                progress=update,
            )
        else:
            made = compute_imatrix(
                path, data, options, n_chunks=chunks, output=process_output, progress=update
            )
    write_imatrix(out, replace(made, name=str(out)), force=force)
    if json_:
        facts = {"path": str(out), "entries": len(made.entries), "n_chunks": made.n_chunks, "n_ctx": n_ctx}
        print(json.dumps(facts, indent=2))
    else:
        stdout().print(
            f"{out}  {len(made.entries)} entries from {made.n_chunks} chunks of {n_ctx}", markup=False
        )
