"""A model on one HTML page that needs nothing beside it: the file as a map, every tensor, a block of each taken apart.

What a page shows of a stranger's file is escaped by the template, and its data are JSON in an inert element; the page may
load nothing from anywhere (its own Content-Security-Policy says so).
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ggtool.gguf.blocks import fields
from ggtool.gguf.header import ArrayRef, GGUFHeader, TensorInfo
from ggtool.gguf.tensor_types import TENSOR_TYPES
from ggtool.inspection.facts import Facts, finite, first_elements, type_name
from ggtool.inspection.hexwalk import BlockView, read_block
from ggtool.inspection.opened import WITHOUT_FLOATS, Opened, Part
from ggtool.inspection.probe import Answer
from ggtool.inspection.statistics import TensorStatistics, measure_all
from ggtool.inspection.words import size
from ggtool.system.progress import Progress

_PAGE = Path(__file__).parent / "page"
# A block is a few kB of the page.
_MOST_BLOCKS = 200
_SHOWN_CHARS = 20_000


def make_page(
    model: Opened,
    facts: Facts,
    answer: Answer | None,
    template: str,
    *,
    is_refused: bool,
    threads: int,
    progress: Progress = lambda done, total: None,
) -> str:
    """Return the page. Of a model that is not here, or whose layout is wrong, weights are not shown.

    `template` is the chat template's rendering of a sample, or why there is none if `is_refused`.
    """
    reads = model.is_local and not model.problems
    measured = [pair for pair in model.tensors if pair[0].type_name not in WITHOUT_FLOATS] if reads else []
    statistics = {one.name: one for one in measure_all(measured, threads, progress)}
    blocks = _blocks(model) if reads else {}
    environment = Environment(
        loader=FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["size"] = size
    data = {
        "file_bytes": model.parts[0].header.size,
        "data_offset": model.parts[0].header.data_offset,
        "tensors": [
            _tensor(tensor, number, statistics.get(tensor.name))
            for number, part in enumerate(model.parts)
            for tensor in part.header.tensors
        ],
        "parts": [
            {"name": part.header.path.name, "bytes": part.header.size, "data_offset": part.header.data_offset}
            for part in model.parts
        ],
        "blocks": {name: _block(view) for name, view in blocks.items()},
        "fields": {
            kind: [dataclasses.asdict(field) for field in fields(kind)]
            for kind in {view.tensor.type_name for view in blocks.values()}
        },
    }
    return environment.get_template("page.html").render(
        title=model.header.path.name,
        facts=facts,
        answer=answer,
        sample=template[:_SHOWN_CHARS],
        is_refused=is_refused,
        source=facts.chat_template[:_SHOWN_CHARS],
        keys=_keys(model.header),
        has_weights=reads,
        style=Markup((_PAGE / "page.css").read_text(encoding="utf-8")),  # noqa: S704 - our own file
        script=Markup((_PAGE / "page.js").read_text(encoding="utf-8")),  # noqa: S704 - our own file
        data=Markup(_inert(data)),  # noqa: S704 - JSON without a "<"
    )


def _inert(data: Any) -> str:
    """Return JSON that cannot end the element it stands in."""
    text = json.dumps(finite(data), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _blocks(model: Opened) -> dict[str, BlockView]:
    """Take one block of each tensor apart: its first; of very many tensors, of some evenly among them."""
    sizes = {name: block_bytes for name, _, block_bytes in TENSOR_TYPES.values()}
    quantized = [pair for pair in model.tensors if sizes[pair[0].type_name] > 8]
    step = max(1, math.ceil(len(quantized) / _MOST_BLOCKS))
    return {tensor.name: _first_block(tensor, part) for tensor, part in quantized[::step]}


def _first_block(tensor: TensorInfo, part: Part) -> BlockView:
    return read_block(part, tensor, 0)


def _tensor(tensor: TensorInfo, part: int, statistics: TensorStatistics | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "type": tensor.type_name,
        "offset": tensor.offset,
        "bytes": tensor.n_bytes,
        "params": tensor.n_params,
        "part": part,
    }
    if statistics is not None:
        numbers = ("minimum", "maximum", "mean", "std", "skewness", "kurtosis", "largest_sigmas")
        found["stats"] = {name: float(f"{getattr(statistics, name):.5g}") for name in numbers}
        counts = ("n_nan", "n_inf", "n_zero", "n_outliers", "histogram")
        found["stats"].update({name: getattr(statistics, name) for name in counts})
    return found


def _block(view: BlockView) -> dict[str, Any]:
    block = view.block
    return {
        "offset": view.offset,
        "hex": "".join(row.data.hex() for row in view.rows),
        "values": [row.value for row in view.rows],
        "groups": [dataclasses.asdict(group) for group in block.groups],
        "levels": [] if block.levels is None else block.levels.tolist(),
        "codes": [] if block.codes is None else block.codes.tolist(),
        "weights": [float(f"{weight:.6g}") for weight in view.weights],
    }


def _keys(header: GGUFHeader) -> list[tuple[str, str, str]]:
    """Return key, type and value of every pair, long values shortened."""
    rows = []
    for key, value in header.metadata.items():
        if isinstance(value, ArrayRef):
            shown = ", ".join(repr(one) for one in first_elements(header, key))
            text = f"{value.length:,} elements: {shown}{', …' if value.length > 8 else ''}"
        else:
            text = str(value)
        rows.append((key, type_name(header, key), text if len(text) <= 300 else text[:300] + "…"))
    return rows
