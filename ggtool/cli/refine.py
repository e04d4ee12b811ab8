"""`ggtool refine`: the same GGUF, closer to the checkpoint that it was made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ggtool.cli.flags import Device, Force, Json, Model, Quiet, Revision, Threads


def refine(
    path: Annotated[Path, typer.Argument(help="A quantized .gguf file.", show_default=False)],
    calibration: Annotated[
        Path, typer.Option("--calibration", help="A text for the model to read, UTF-8.", show_default=False)
    ],
    model: Model = None,
    revision: Revision = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Default: NAME-refined.gguf beside the file.", show_default=False),
    ] = None,
    calibration_chunks: Annotated[
        int, typer.Option("--calibration-chunks", min=0, help="Chunks of 512 tokens to take; 0 is 128.")
    ] = 0,
    device: Annotated[
        Device, typer.Option("--device", case_sensitive=False, help="Where the model runs.")
    ] = "cpu",
    threads: Threads = 0,
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Move a GGUF file's codes and scales so that the model's layers compute what they did before quantization.

    Types and sizes stay. Tensors of other types than Q8_0, Q6_K to Q2_K, Q5_0, Q4_0, IQ4_NL and IQ4_XS stay as they are.

    Example: [bold]ggtool refine my-gpt2-Q4_K_M.gguf --model ./my-gpt2 --calibration text.txt[/bold]
    """
    from ggtool.backends.device import choose_device
    from ggtool.calibration.refine import refine as refine_file
    from ggtool.cli.console import notifier, progress_bar, stdout
    from ggtool.source.resolve import resolve
    from ggtool.system.machine import usable_cpus

    source = resolve(model, revision, notifier(quiet=quiet))
    with progress_bar(quiet=quiet) as update:
        made = refine_file(
            path,
            source,
            calibration,
            out or path.with_name(f"{path.stem}-refined.gguf"),
            n_chunks=calibration_chunks or None,
            device=choose_device(device),
            threads=threads or usable_cpus(),
            force=force,
            progress=update,
        )
    found = made.made
    if json_:
        print(json.dumps({"path": str(made.path), "matrices": found.facts}, indent=2))
        return
    stdout().print(
        f"{made.path}  {found.n_improved} of {len(found.facts)} matrices improved, output error "
        f"{found.relative_error:.3f} of the file's before",
        markup=False,
    )
