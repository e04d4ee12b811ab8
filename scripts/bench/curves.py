#!/usr/bin/env python3
"""Held-out perplexity against seconds of training, as a figure: the curves that `scripts/bench/qat.py` leaves behind.

python scripts/bench/curves.py --out docs/qat.svg --level "fp32=34.0" "H100=curve.jsonl" "two CPU cores=cpu.jsonl"
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

Points = tuple[list[float], list[float]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("series", nargs="+", metavar="NAME=FILE")
    parser.add_argument(
        "--level", action="append", default=[], metavar="NAME=PERPLEXITY", help="a dashed line"
    )
    parser.add_argument("--out", type=Path, required=True, help="figure to write, .svg or .png")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    series = {name: read(Path(file)) for name, file in map(parted, args.series)}
    draw(series, [(name, float(level)) for name, level in map(parted, args.level)]).savefig(args.out)


def parted(text: str) -> tuple[str, str]:
    """Part NAME=VALUE at its last =."""
    name, _, value = text.rpartition("=")
    return name, value


def read(path: Path) -> Points:
    """Return seconds and perplexities of a curve.jsonl."""
    points = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [point["seconds"] for point in points], [point["heldout_ppl"] for point in points]


def draw(series: Mapping[str, Points], levels: Sequence[tuple[str, float]]) -> Figure:
    """Draw each curve, named at its end, and each level across."""
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "ggtool", "font.family": "DejaVu Sans"}
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, (seconds, perplexities) in series.items():
        (line,) = axes.plot(seconds, perplexities, "o-", ms=3.5, lw=1.2)
        end = f"{name}: {perplexities[-1]:.1f}"
        axes.annotate(
            end, (seconds[-1], perplexities[-1]), (0, 9), textcoords="offset points", ha="right", color=line.get_color()
        )  # fmt: skip
    for name, level in levels:
        axes.axhline(level, color="#6b7280", lw=0.9, ls="--")
        axes.annotate(
            f"{name}: {level:g}", (axes.get_xlim()[1] / 2, level), (0, -12), textcoords="offset points", color="#6b7280"
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=26)
    axes.set_yticks([30, 50, 100, 200, 500, 1000])
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("held-out perplexity")
    axes.grid(color="#d9dbe0", lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
