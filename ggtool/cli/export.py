"""`ggtool export`: a GGUF file back to a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ggtool.cli.flags import Force, Json, Quiet

Dtype = Literal["auto", "f32", "f16", "bf16"]


def export(
    path: Annotated[Path, typer.Argument(help="A .gguf file, or the first part of one.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The folder. Default: NAME-hf beside it.", show_default=False),
    ] = None,
    dtype: Annotated[
        Dtype,
        typer.Option("--dtype", help="Type of the weights; auto keeps floats and makes f32 of the rest."),
    ] = "auto",
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Most bytes of weights in a file.")
    ] = "5GB",
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a GGUF model as a Hugging Face checkpoint: config.json, dequantized safetensors, tokenizer.

    For every architecture that `ggtool formats --architectures` lists first. Names, transposes and permutations are undone,
    so that transformers computes the same logits and the folder can be evaluated, fine-tuned and converted again.

    Example: [bold]ggtool export models/gpt2-Q8_0.gguf --out ./gpt2-from-gguf[/bold]
    """
    from ggtool.cli.console import progress_bar, stdout
    from ggtool.conversion.export.export import export as export_file
    from ggtool.system.disk import parse_size

    folder = out or path.with_name(path.name.removesuffix(".gguf") + "-hf")
    with progress_bar(quiet=quiet) as update:
        made = export_file(
            path,
            folder,
            dtype=None if dtype == "auto" else dtype,
            max_shard_bytes=parse_size(max_shard_size),
            force=force,
            progress=update,
        )
    if json_:
        facts = {"folder": str(made.folder), "class": made.class_name, "dtype": made.dtype}
        print(
            json.dumps(
                {**facts, "exact": made.is_exact, "weights_bytes": made.n_bytes, "seconds": made.seconds},
                indent=2,
            )
        )
        return
    exact = "exactly the file's weights" if made.is_exact else "the file's weights, rounded"
    stdout().print(
        f"{made.folder}  {made.class_name}  {made.n_bytes / 2**20:.2f} MiB of {made.dtype}, {exact}",
        markup=False,
    )
