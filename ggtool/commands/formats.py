"""`ggtool formats`: every format there is."""

from __future__ import annotations

import dataclasses
import json

from rich.table import Table

from ggtool.commands.console import stdout
from ggtool.formats import FORMATS


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
