"""`ggtool formats --backend`: how a format stores each module of a model, or each tensor of its GGUF file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from ggtool.backends.device import choose_device
from ggtool.cli.console import notifier, stdout
from ggtool.conversion.convert import plan_tensors
from ggtool.errors import UsageError
from ggtool.formats import Format
from ggtool.quantizers.format_spec import Spec, parse_backend
from ggtool.quantizers.saved_folder import read_facts
from ggtool.source.resolve import ModelSource, resolve


@dataclass(frozen=True)
class Row:
    """One matrix or tensor: its names, its shape (rows first), and its format."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    held_as: str


def run(model: str | None, revision: str | None, backend: str, *, as_json: bool) -> None:
    """Print the format of each matrix of a model, or the type of each tensor of its GGUF file; reads no weights."""
    spec = parse_backend(backend)
    rows = _saved(spec.what) if isinstance(spec.what, Path) else _planned(model, revision, spec, spec.what)
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return
    table = Table("name", "shape", "held as", header_style="bold")
    for row in rows:
        table.add_row(" = ".join(row.names), " x ".join(map(str, row.shape)), row.held_as)
    stdout().print(table)


def _saved(path: Path) -> list[Row]:
    """Return the matrices of a model that `ggtool quantize` saved, as its config has them."""
    if not path.is_dir():
        raise UsageError(
            f"{path} is a file; a format's name belongs after --backend, such as gguf-q4_k_m, or a saved model's folder."
        )
    return [Row(one.names, one.shape, one.quantizer) for one in read_facts(path).matrices]


def _planned(model: str | None, revision: str | None, spec: Spec, fmt: Format) -> list[Row]:
    source = resolve(model, revision, notifier(quiet=False))
    return _tensors(source, spec, fmt) if fmt.container == "gguf" else _matrices(source, spec)


def _tensors(source: ModelSource, spec: Spec, fmt: Format) -> list[Row]:
    # Types that llama.cpp chooses for a file with an importance matrix are not always those of one without.
    fmt = replace(fmt, needs_imatrix=spec.imatrix or fmt.needs_imatrix)
    return [Row((name,), shape, kind) for name, shape, kind in plan_tensors(source, fmt)]


def _matrices(source: ModelSource, spec: Spec) -> list[Row]:
    from ggtool.quantizers.preview import preview

    assert isinstance(spec.what, Format)
    found = preview(spec.what, source.folder, choose_device("auto"), spec.components)
    return [Row(matrix.names, matrix.shape, matrix.held_as) for matrix in found]
