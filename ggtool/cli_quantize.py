"""The flags of `ggtool quantize`. Nothing heavy is imported up here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ggtool.flags import (
    Calibration,
    CalibrationChunks,
    DeviceOption,
    Force,
    Json,
    Model,
    Quiet,
    Revision,
    Threads,
)


def quantize(
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            "-b",
            help="A from-scratch format, e.g. scratch-iq4, scratch-int8:attn or scratch-gptq4.",
            show_default=False,
        ),
    ],
    model: Model = None,
    revision: Revision = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The folder to make. Default: models/NAME-FORMAT.", show_default=False
        ),
    ] = None,
    calibration: Calibration = None,
    calibration_chunks: CalibrationChunks = None,
    threads: Threads = 0,
    device: DeviceOption = "auto",
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a checkpoint from scratch and save it packed, as a folder that eval, chat and generate open.

    Example: [bold]ggtool quantize --model ./my-gpt2 --backend scratch-iq4 --out ./my-gpt2-iq4[/bold]
    """
    from ggtool.commands.quantize import Request, run

    request = Request(
        backend=backend,
        model=model,
        revision=revision,
        out=out,
        calibration=calibration,
        calibration_chunks=calibration_chunks,
        device=device,
        threads=threads,
        force=force,
    )
    run(request, as_json=json_, quiet=quiet)
