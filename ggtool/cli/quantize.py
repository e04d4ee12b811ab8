"""`ggtool quantize`: a checkpoint, packed in a from-scratch format or a mix, in a self-contained folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ggtool.cli.flags import (
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
from ggtool.errors import UsageError

if TYPE_CHECKING:
    from ggtool.calibration.make_folder import MadeFolder
    from ggtool.quantizers.qat.run import Point

_MIB = 2**20
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
    from ggtool import api
    from ggtool.calibration.make_folder import QuantizeRequest
    from ggtool.cli.console import notifier, progress_bar, stderr
    from ggtool.quantizers.qat.flags import Training

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
    request = QuantizeRequest(
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
    console = stderr(quiet=quiet)
    with progress_bar(quiet=quiet) as update:
        made = api.quantize(
            request,
            notify=notifier(quiet=quiet),
            progress=update,
            on_point=lambda point: console.print(describe_point(point), markup=False),
        )
    print_folder(made, as_json=json_)


def print_folder(made: MadeFolder, *, as_json: bool) -> None:
    """Print the facts of a folder that was just made."""
    from ggtool.cli.console import stdout
    from ggtool.formats import label

    n_bytes = sum(file.stat().st_size for file in made.path.glob("*.safetensors"))
    if as_json:
        facts = {
            "path": str(made.path),
            "format": made.format.backend,
            "components": made.components,
            "n_bytes": n_bytes,
            "seconds": made.seconds,
            **made.method,
        }
        print(json.dumps(facts, indent=2))
        return
    more = made.method
    expected = (
        f"  {more['bpw']:.3f} bits per weight in memory, expected KLD {more['expected_kld']:.4f}"
        if "bpw" in more
        else ""
    )
    stdout().print(
        f"{made.path}  {label(made.format.backend, made.components)}{expected}  {n_bytes / _MIB:.2f} MiB on disk  "
        f"{made.seconds:.1f} s",
        markup=False,
    )


def describe_point(point: Point) -> str:
    """Return one point of a training's curve as a line."""
    loss = "" if point.loss is None else f", loss {point.loss:.4f}"
    return f"step {point.step}, {point.tokens:,} tokens, {point.seconds:.0f} s{loss}, held-out perplexity {point.heldout_ppl:.4f}"
