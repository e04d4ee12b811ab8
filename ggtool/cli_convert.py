"""The flags of `ggtool convert` and `ggtool imatrix`. Nothing heavy is imported up here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ggtool.flags import (
    AllowPickle,
    DeviceOption,
    Force,
    Json,
    Model,
    Quiet,
    Revision,
    Threads,
    TrustRemoteCode,
)

_TYPES, _MATRIX, _FILES = "Tensor types", "Importance matrix", "Files"


def _text(flag: str, help_: str, panel: str) -> Any:
    return typer.Option(flag, help=help_, show_default=False, rich_help_panel=panel)


def convert(
    qtype: Annotated[
        list[str] | None,
        typer.Option(
            "--qtype",
            help="Quant types, e.g. q4_0,q4_k_m,f16, or all. Repeatable, comma lists.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="A .gguf file (one quant type) or a folder. Default: models/NAME-QTYPE.gguf.",
            show_default=False,
        ),
    ] = None,
    imatrix: Annotated[
        Path | None, _text("--imatrix", "Weigh errors by this importance matrix.", _MATRIX)
    ] = None,
    calibration: Annotated[
        Path | None, _text("--calibration", "Compute an importance matrix from this text first.", _MATRIX)
    ] = None,
    calibration_chunks: Annotated[
        int,
        typer.Option(
            "--calibration-chunks",
            min=0,
            help="Chunks of 512 tokens to take; 0 is the whole text.",
            rich_help_panel=_MATRIX,
        ),
    ] = 0,
    tensor_type: Annotated[
        list[str] | None,
        _text("--tensor-type", "REGEX=TYPE for tensors whose name it is found in. Repeatable.", _TYPES),
    ] = None,
    output_tensor_type: Annotated[
        str | None, _text("--output-tensor-type", "Type of output.weight, or of a tied embedding.", _TYPES)
    ] = None,
    token_embedding_type: Annotated[
        str | None, _text("--token-embedding-type", "Type of the token embedding.", _TYPES)
    ] = None,
    pure: Annotated[bool, _text("--pure", "No mix: one tensor type throughout.", _TYPES)] = False,
    leave_output_tensor: Annotated[
        bool, _text("--leave-output-tensor", "Do not quantize output.weight.", _TYPES)
    ] = False,
    target_size: Annotated[
        str | None, _text("--target-size", "Choose the mix that fits, e.g. 60MB, and loses least.", _TYPES)
    ] = None,
    target_bpw: Annotated[
        float | None, _text("--target-bpw", "The same, in bits per weight over the whole file.", _TYPES)
    ] = None,
    recipe: Annotated[Path | None, _text("--recipe", "Make the mix of this recipe again.", _TYPES)] = None,
    split_max_size: Annotated[
        str | None, _text("--split-max-size", "Split into parts of at most this size, e.g. 2G.", _FILES)
    ] = None,
    name: Annotated[str | None, _text("--name", "The model's name in the file.", _FILES)] = None,
    metadata: Annotated[
        list[str] | None, _text("--metadata", "KEY=VALUE to set in the file. Repeatable.", _FILES)
    ] = None,
    vocab_only: Annotated[bool, _text("--vocab-only", "Write the vocabulary alone.", _FILES)] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print size, bits per weight and memory of each file.")
    ] = False,
    threads: Threads = 0,
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a Hugging Face checkpoint to GGUF, in every quant type asked for, in one pass.

    Examples:
    [bold]ggtool convert --model ./my-gpt2 --qtype q8_0,q4_k_m[/bold]

    [bold]ggtool convert --qtype iq3_xxs --calibration text.txt[/bold]

    [bold]ggtool convert --dry-run[/bold]
    """
    from ggtool.commands.convert import Request, run

    request = Request(
        qtypes=tuple(qtype or ()),
        model=model,
        revision=revision,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        out=out,
        imatrix=imatrix,
        calibration=calibration,
        calibration_chunks=calibration_chunks,
        tensor_types=tuple(tensor_type or ()),
        output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type,
        pure=pure,
        leave_output_tensor=leave_output_tensor,
        target_size=target_size,
        target_bpw=target_bpw,
        recipe=recipe,
        split_max_size=split_max_size,
        name=name,
        metadata=tuple(metadata or ()),
        vocab_only=vocab_only,
        threads=threads,
        force=force,
    )
    run(request, dry_run=dry_run, as_json=json_, quiet=quiet)


def imatrix(
    path: Annotated[Path, typer.Argument(help="A .gguf file, best of full precision.", show_default=False)],
    data: Annotated[
        Path, typer.Option("--data", "-d", help="The calibration text, UTF-8.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("imatrix.gguf"),
    chunks: Annotated[int, typer.Option("--chunks", min=0, help="Chunks to run; 0 is the whole text.")] = 0,
    n_ctx: Annotated[int, typer.Option("--n-ctx", "-c", min=16, help="Tokens in a chunk.")] = 512,
    process_output: Annotated[
        bool, typer.Option("--process-output", help="Take the output matrix in, a tied one too.")
    ] = False,
    threads: Threads = 0,
    device: DeviceOption = "cpu",
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compute an importance matrix: how strongly a text uses each weight of a model.

    Example: [bold]ggtool imatrix models/gpt2-F16.gguf --data text.txt -o gpt2-imatrix.gguf[/bold]
    """
    from ggtool.commands.imatrix import run

    run(
        path,
        data,
        out,
        n_chunks=chunks,
        n_ctx=n_ctx,
        process_output=process_output,
        threads=threads,
        device=device,
        force=force,
        as_json=json_,
        quiet=quiet,
    )
