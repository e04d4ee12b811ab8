"""`ggtool formats`: list formats, architectures, and how a format stores each matrix of a model."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from ggtool.cli.flags import Json, Model, Revision
from ggtool.errors import UsageError
from ggtool.formats import FORMATS

_OWN, _VENDORED = "ggtool", "llama.cpp"


def formats(
    architectures: Annotated[
        bool,
        typer.Option("--architectures", help="List the model architectures that can be converted instead."),
    ] = False,
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            "-b",
            help="List what each matrix of --model is held as in this format, e.g. scratch-int8:attn, or in a saved model.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    json_: Json = False,
) -> None:
    """List every format: the names for --qtype and --backend, and their bits per weight.

    With --backend: which modules or tensors of a model that format touches, without reading a weight.

    Examples:
    [bold]ggtool formats --architectures[/bold]

    [bold]ggtool formats --model ./my-gpt2 --backend scratch-int8:blocks=0-4[/bold]
    """
    if architectures and backend is not None:
        raise UsageError("--architectures and --backend exclude each other; pass only one of them.")
    if backend is None and (model is not None or revision is not None):
        raise UsageError("--model is for --backend: name the format, such as --backend scratch-int8:attn.")
    if architectures:
        list_architectures(as_json=json_)
    elif backend is not None:
        from ggtool.cli.modules import run as list_modules

        list_modules(model, revision, backend, as_json=json_)
    else:
        list_formats(as_json=json_)


def list_formats(*, as_json: bool) -> None:
    """Print FORMATS as a table, or as a JSON array."""
    rows = list(FORMATS.values())
    if as_json:
        print(json.dumps([{**dataclasses.asdict(row), "backend": row.backend} for row in rows], indent=2))
        return
    from rich.table import Table

    from ggtool.cli.console import stdout

    table = Table(header_style="bold")
    for heading in ("--qtype", "--backend", "runs in", "bits per weight"):
        table.add_column(heading, justify="right" if heading.startswith("bits") else "left")
    for row in rows:
        qtype = row.name.lower() if row.container == "gguf" else ""
        table.add_row(qtype, row.backend, row.runtime.replace("_", "."), f"{row.bits:g}")
    stdout().print(table)


def list_architectures(*, as_json: bool) -> None:
    """Print the architectures and whose converter reads them; llama.cpp's are missing where it is not unpacked."""
    found = architectures()
    if as_json:
        print(
            json.dumps(
                [{"architecture": name, "converter": whose} for name, whose in found.items()], indent=2
            )
        )
        return
    from rich.table import Table

    from ggtool.cli.console import stdout

    table = Table("architecture", "converter", header_style="bold")
    for name, whose in found.items():
        table.add_row(name, whose)
    stdout().print(table)


def architectures() -> dict[str, str]:
    """Return {the name in config.json: "ggtool" or "llama.cpp"}, ggtool's own first."""
    from ggtool.cli.console import notifier
    from ggtool.conversion.architectures import ARCHITECTURES
    from ggtool.conversion.vendored import find_llama_cpp, vendored_architectures
    from ggtool.errors import SourceError

    found = dict.fromkeys(ARCHITECTURES, _OWN)
    try:
        for name in vendored_architectures(find_llama_cpp()):
            found.setdefault(name, _VENDORED)
    except SourceError as error:
        notifier(quiet=False)(str(error))
    return found
