"""What `ggtool inspect` prints of a file's weights and bytes: --tensors, and --hex down to a block."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ggtool.errors import ArtifactError, UsageError
from ggtool.inspection.words import one_line, printable

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from ggtool.inspection.hexwalk import BlockView, Row
    from ggtool.inspection.opened import Opened
    from ggtool.inspection.statistics import TensorStatistics


def show_statistics(
    model: Opened, pattern: str, sort: str, threads: int, *, as_json: bool, quiet: bool
) -> None:
    """Print range, moments, outliers and histogram of the tensors whose names match; of a file that is here."""
    import dataclasses

    from ggtool.cli.console import progress_bar, stdout
    from ggtool.inspection.facts import select
    from ggtool.inspection.opened import WITHOUT_FLOATS
    from ggtool.inspection.statistics import measure_all

    if not model.is_local:
        raise UsageError(
            f"{model.name} is not on this machine; statistics need its weights. Download it first."
        )
    refuse_damaged(model)
    part_of = {tensor.name: part for tensor, part in model.tensors}
    chosen = [
        one for one in select(model.header.tensors, pattern, sort) if one.type_name not in WITHOUT_FLOATS
    ]
    if not chosen:
        raise UsageError(f"no tensor of {model.name} matches {pattern!r}; --list '*' lists all.")
    with progress_bar(quiet=quiet) as update:
        found = measure_all(
            [(tensor, part_of[tensor.name]) for tensor in chosen],
            threads,
            lambda done, total: update("reading", done, total),
        )
    if as_json:
        from ggtool.inspection.facts import finite

        print(json.dumps(finite([dataclasses.asdict(one) for one in found]), indent=1))
        return
    _print_statistics(stdout(), found)


def _print_statistics(out: Console, found: list[TensorStatistics]) -> None:
    """Print one row a tensor."""
    from rich.table import Table
    from rich.text import Text

    from ggtool.inspection.statistics import OUTLIER_SIGMAS, histogram_line

    table = Table(header_style="bold")
    table.add_column("tensor", no_wrap=True)
    table.add_column("type")
    for heading in (
        "min",
        "max",
        "mean",
        "std",
        "skew",
        "kurt",
        "zero %",
        f">{OUTLIER_SIGMAS:g}σ",
        "max σ",
        "NaN, Inf",
    ):
        table.add_column(heading, justify="right")
    table.add_column("min to max", no_wrap=True)
    for one in found:
        bad = one.n_nan + one.n_inf
        table.add_row(
            Text(one_line(one.name)),
            one.type_name,
            *(
                f"{number:.3g}"
                for number in (one.minimum, one.maximum, one.mean, one.std, one.skewness, one.kurtosis)
            ),
            f"{100 * one.n_zero / one.n:.2f}",
            f"{one.n_outliers:,}",
            f"{one.largest_sigmas:.1f}",
            Text(f"{one.n_nan:,}, {one.n_inf:,}" if bad else "0", style="bold red" if bad else ""),
            histogram_line(one.histogram, 16 if len(found) > 1 else 64),
        )
    out.print(table)


def show_header(path: Path, *, as_json: bool) -> None:
    """Print every field of a header with its bytes and its meaning."""
    from ggtool.cli.console import stdout
    from ggtool.inspection.hexwalk import walk_header

    rows = walk_header(path)
    if as_json:
        print(json.dumps([_row_json(row) for row in rows], indent=1, ensure_ascii=False))
        return
    out = stdout()
    for row in rows:
        _print_row(out, row)


def show_block(model: Opened, where: str, *, as_json: bool) -> None:
    """Print one block of weights taken apart; `where` is TENSOR or TENSOR:BLOCK."""
    from ggtool.cli.console import stdout
    from ggtool.inspection.hexwalk import view_block

    if not model.is_local:
        raise UsageError(
            f"{model.name} is not on this machine; a block needs its weights. Download it first."
        )
    refuse_damaged(model)
    view = view_block(model, where)
    if as_json:
        print(json.dumps(block_json(view), indent=1))
        return
    _print_block(stdout(), view)


def _print_block(out: Console, view: BlockView) -> None:
    from rich.table import Table

    tensor, block = view.tensor, view.block
    shape = " x ".join(map(str, tensor.shape))
    row, column = divmod(view.index * block.n_weights, tensor.shape[-1])
    out.print(f"{one_line(tensor.name)}  {shape} {tensor.type_name}", style="bold", markup=False)
    out.print(
        f"block {view.index} at byte {view.offset:,}: {block.n_weights} weights of row {row} from column {column}, "
        f"{sum(one.n_bytes for one in view.rows)} bytes",
        markup=False,
    )
    for one in view.rows:
        _print_row(out, one)
    if block.groups and block.codes is not None and block.levels is not None:
        is_split = block.groups[0].scale_code is not None
        table = Table(header_style="bold")
        for heading in (
            "weights",
            *(("scale code", "min code") if is_split else ()),
            "scale",
            "minimum",
            "levels",
        ):
            table.add_column(heading, justify="left" if heading == "levels" else "right")
        for group in block.groups:
            codes = (
                (str(group.scale_code), "" if group.minimum_code is None else str(group.minimum_code))
                if is_split
                else ()
            )
            own = block.levels[group.start : group.start + group.n_weights].tolist()
            table.add_row(
                f"{group.start} to {group.start + group.n_weights - 1}",
                *codes,
                f"{group.scale:.6g}",
                f"{group.minimum:.6g}",
                " ".join(map(str, own)),
            )
        out.print("weight = scale x level - minimum", markup=False)
        out.print(table)
    if view.weights:
        out.print("weights, as ggml reads them:", markup=False)
        for start in range(0, len(view.weights), 8):
            out.print(
                "  " + " ".join(f"{weight:11.4g}" for weight in view.weights[start : start + 8]), markup=False
            )


def _print_row(out: Console, row: Row) -> None:
    from ggtool.inspection.hexwalk import SHOWN_BYTES, dump

    lines = list(dump(row.data[:SHOWN_BYTES]))
    said = f" = {row.value}" if row.value else ""
    more = f" ({row.n_bytes:,} bytes)" if row.n_bytes > len(row.data) else ""
    out.print(
        f"{row.offset:10x}  {lines[0] if lines else '':47}  {printable(row.what)}{printable(said)}{more}",
        markup=False,
    )
    for number, line in enumerate(lines[1:], 1):
        out.print(f"{row.offset + 16 * number:10x}  {line}", style="dim", markup=False)


def block_json(view: BlockView) -> dict[str, Any]:
    """Return a block as plain data."""
    import dataclasses

    block = view.block
    return {
        "tensor": view.tensor.name,
        "type": view.tensor.type_name,
        "block": view.index,
        "offset": view.offset,
        "fields": [_row_json(row) for row in view.rows],
        "groups": [dataclasses.asdict(group) for group in block.groups],
        "codes": None if block.codes is None else block.codes.tolist(),
        "levels": None if block.levels is None else block.levels.tolist(),
        "weights": [repr(weight) if weight != weight else weight for weight in view.weights],
    }


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "offset": row.offset,
        "bytes": row.n_bytes,
        "hex": row.data.hex(),
        "what": row.what,
        "value": row.value,
    }


def refuse_damaged(model: Opened) -> None:
    """Weights are not read where the layout is wrong: they would be another tensor's, or not there."""
    for problem in model.problems:
        raise ArtifactError(f"{model.name} cannot be used: {problem.message}.")
