"""`ggtool split` and `ggtool merge`: a GGUF file in parts, and the parts in one file again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ggtool.cli.flags import Force, Json, Quiet


def split(
    path: Annotated[Path, typer.Argument(help="A .gguf file.", show_default=False)],
    max_size: Annotated[
        str | None,
        typer.Option(
            "--max-size", help="Most bytes of tensors in a part, e.g. 2G or 500M.", show_default=False
        ),
    ] = None,
    max_tensors: Annotated[
        int | None, typer.Option("--max-tensors", min=1, help="Most tensors in a part.", show_default=False)
    ] = None,
    metadata_first: Annotated[
        bool, typer.Option("--no-tensor-first-split", help="The first part holds the keys alone.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="NAME.gguf of the parts NAME-00001-of-00003.gguf.", show_default=False
        ),
    ] = None,
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Split a GGUF file into parts that llama.cpp opens by the first one, as llama-gguf-split makes them.

    Example: [bold]ggtool split models/gpt2-F16.gguf --max-size 100M[/bold]
    """
    from ggtool.cli.console import progress_bar, stdout
    from ggtool.gguf.split import split as split_file
    from ggtool.system.disk import parse_size

    with progress_bar(quiet=quiet) as update:
        made = split_file(
            path,
            out or path,
            max_bytes=parse_size(max_size) if max_size else None,
            max_tensors=max_tensors,
            metadata_first=metadata_first,
            force=force,
            progress=update,
        )
    if json_:
        print(json.dumps([{"path": str(part), "n_bytes": part.stat().st_size} for part in made], indent=2))
        return
    for part in made:
        stdout().print(f"{part}  {part.stat().st_size / 2**20:.2f} MiB", markup=False)


def merge(
    path: Annotated[
        Path, typer.Argument(help="The first part, NAME-00001-of-00003.gguf.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Default: NAME.gguf beside it.", show_default=False)
    ] = None,
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge the parts of a split GGUF file: the file that was split, byte for byte.

    Example: [bold]ggtool merge models/gpt2-F16-00001-of-00003.gguf[/bold]
    """
    from ggtool.cli.console import progress_bar, stdout
    from ggtool.gguf.split import default_merged_path
    from ggtool.gguf.split import merge as merge_files

    out = out or default_merged_path(path)
    with progress_bar(quiet=quiet) as update:
        merge_files(path, out, force=force, progress=update)
    n_bytes = out.stat().st_size
    if json_:
        print(json.dumps({"path": str(out), "n_bytes": n_bytes}, indent=2))
    else:
        stdout().print(f"{out}  {n_bytes / 2**20:.2f} MiB", markup=False)
