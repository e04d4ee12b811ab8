#!/usr/bin/env python3
"""Does a larger quantized model beat a smaller full one? A table and a figure of bits per byte of text against bytes of weights.

    python scripts/bench/sizes.py --out docs/sizes.svg "51 M=51m.json" "14 M=mid.json" "7 M=demo.json"

The files are those of `scripts/bench/quality.py --json`, each of one model on the same text. Models have vocabularies of their
own, so perplexities of their tokens cannot be compared, and bits per byte can.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

Row = Mapping[str, Any]
MEGABYTE = 1_000_000


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("series", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--out", type=Path, required=True, help="figure to write, .svg or .png")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    series: dict[str, list[Row]] = {}
    for one in args.series:
        name, _, file = one.rpartition("=")
        rows = json.loads(Path(file).read_text(encoding="utf-8"))
        series[name] = sorted(rows, key=lambda row: row["weights_bytes"])
    print(table(series))
    draw(series).savefig(args.out)


def table(series: Mapping[str, Sequence[Row]]) -> str:
    """Return all rows in Markdown, smallest first."""
    lines = [
        "| model | format | weights, MB | bits per weight | bits per byte of text |",
        "| --- | --- | --: | --: | --: |",
    ]
    rows = [(name, row) for name, rows in series.items() for row in rows]
    for name, row in sorted(rows, key=lambda pair: pair[1]["weights_bytes"]):
        size = row["weights_bytes"] / MEGABYTE
        lines.append(
            f"| {name} | {row['format']} | {size:.1f} | {row['bpw']:.2f} | {row['bits_per_byte']:.4f} |"
        )
    return "\n".join(lines)


def draw(series: Mapping[str, Sequence[Row]]) -> Figure:
    """Draw every format as a point, and what no smaller format of the same model beats as a line."""
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "ggtool", "font.family": "DejaVu Sans"}
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, rows in by_family(series).items():
        (points,) = axes.plot(*columns(rows), "o", ms=5, label=name)
        axes.plot(*columns(front(rows)), color=points.get_color(), lw=1)
        for row in rows:
            place = (row["weights_bytes"] / MEGABYTE, row["bits_per_byte"])
            text = row["format"].partition("-")[2] if row["format"].startswith("scratch") else bits(row)
            axes.annotate(text, place, (4, 4), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks([10, 20, 50, 100])
    axes.set_xlabel("weights, MB")
    axes.set_ylabel("bits per byte of held-out text")
    axes.grid(color="#d9dbe0", lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def by_family(series: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """Return the rows of each model in two: GGUF files, and from-scratch formats."""
    families = {"GGUF": "gguf-", "from scratch": "scratch-"}
    return {
        f"{name}, {family}": [row for row in rows if row["format"].startswith(prefix)]
        for name, rows in series.items()
        for family, prefix in families.items()
    }


def bits(row: Row) -> str:
    return f"{row['bpw']:.1f} bits"


def columns(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row["weights_bytes"] / MEGABYTE for row in rows], [row["bits_per_byte"] for row in rows]


def front(rows: Sequence[Row]) -> list[Row]:
    """Return the rows, which come smallest first, that are better than all before them."""
    best: list[Row] = []
    for row in rows:
        if not best or row["bits_per_byte"] < best[-1]["bits_per_byte"]:
            best.append(row)
    return best


if __name__ == "__main__":
    main()
