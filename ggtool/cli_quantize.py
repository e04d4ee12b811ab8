"""The flags of `ggtool quantize`. Nothing heavy is imported up here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ggtool.errors import UsageError
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

_QAT = "Quantization-aware training"


def _option(flag: str, help_: str, **limits: Any) -> Any:
    return typer.Option(flag, help=help_, show_default=False, rich_help_panel=_QAT, **limits)


def quantize(
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            "-b",
            help="A from-scratch format, e.g. scratch-iq4, scratch-int8:attn or scratch-gptq4.",
            show_default=False,
        ),
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            "--target-bpw",
            help="Instead: a format for each matrix, so that the model has so many bits per weight and loses least of --calibration.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The folder to make. Default: models/NAME-FORMAT.", show_default=False
        ),
    ] = None,
    qat: Annotated[
        bool,
        typer.Option(
            "--qat", help="Fine-tune with the quantized weights before saving.", rich_help_panel=_QAT
        ),
    ] = False,
    data: Annotated[
        Path | None,
        _option("--data", "Text to train on, UTF-8, plain or .xz, <end of text> between documents."),
    ] = None,
    heldout: Annotated[
        Path | None, _option("--heldout", "Text for the curve. Default: the last hundredth of --data.")
    ] = None,
    steps: Annotated[int | None, _option("--steps", "Train so many steps.", min=1)] = None,
    minutes: Annotated[float | None, _option("--minutes", "Train so long instead.", min=0)] = None,
    lr: Annotated[float | None, _option("--lr", "Peak of the learning rate. Default: 0.001.", min=0)] = None,
    batch_size: Annotated[
        int | None, _option("--batch-size", "Windows in a step. Default: 16.", min=1)
    ] = None,
    n_ctx: Annotated[
        int | None,
        _option("--n-ctx", "Tokens in a window. Default: the model's context, 512 at most.", min=2),
    ] = None,
    seed: Annotated[int | None, _option("--seed", "Of the order of the windows. Default: 0.", min=0)] = None,
    calibration: Calibration = None,
    calibration_chunks: CalibrationChunks = None,
    threads: Threads = 0,
    device: DeviceOption = "auto",
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a checkpoint from scratch and save it packed, as a folder that eval, chat and generate open.

    Examples:
    [bold]ggtool quantize --model ./my-gpt2 --backend scratch-iq4 --out ./my-gpt2-iq4[/bold]

    [bold]ggtool quantize --model ./my-gpt2 --target-bpw 4 --calibration text.txt[/bold]

    [bold]ggtool quantize --model ./my-gpt2 --backend scratch-ternary --qat --data text.txt --minutes 10[/bold]
    """
    from ggtool.commands.quantize import Request, Training, run

    flags = {
        "data": data,
        "heldout": heldout,
        "steps": steps,
        "minutes": minutes,
        "lr": lr,
        "batch_size": batch_size,
        "n_ctx": n_ctx,
        "seed": seed,
    }
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    if given and not qat:
        raise UsageError(f"--{next(iter(given)).replace('_', '-')} is for training; pass --qat too.")
    if qat and data is None:
        raise UsageError("--qat trains on a text: pass --data TEXT.")
    request = Request(
        backend=backend,
        target_bpw=target_bpw,
        model=model,
        revision=revision,
        out=out,
        calibration=calibration,
        calibration_chunks=calibration_chunks,
        device=device,
        threads=threads,
        force=force,
        training=Training(**given) if qat else None,
    )
    run(request, as_json=json_, quiet=quiet)
