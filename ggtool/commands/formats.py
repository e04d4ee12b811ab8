"""`ggtool formats`: every format there is, and every architecture that can be converted."""

from __future__ import annotations

import dataclasses
import json

from rich.table import Table

from ggtool.commands.console import notifier, stdout
from ggtool.formats import FORMATS

_OWN, _VENDORED = "ggtool", "llama.cpp"


def run(*, as_json: bool) -> None:
    """Print FORMATS as a table, or as a JSON array."""
    rows = list(FORMATS.values())
    if as_json:
        print(json.dumps([{**dataclasses.asdict(row), "backend": row.backend} for row in rows], indent=2))
        return
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
    table = Table("architecture", "converter", header_style="bold")
    for name, whose in found.items():
        table.add_row(name, whose)
    stdout().print(table)


def architectures() -> dict[str, str]:
    """Return {the name in config.json: "ggtool" or "llama.cpp"}, ggtool's own first."""
    from ggtool.convert.architectures import ARCHITECTURES
    from ggtool.convert.vendored import find_llama_cpp, vendored_architectures
    from ggtool.errors import SourceError

    found = dict.fromkeys(ARCHITECTURES, _OWN)
    try:
        for name in vendored_architectures(find_llama_cpp()):
            found.setdefault(name, _VENDORED)
    except SourceError as error:
        notifier(quiet=False)(str(error))
    return found
