"""Drawings: matplotlib figures with labelled marks, for the page, the PDF, and SVG and PNG files.

Text stays text in the SVG. Each mark has an id, so that the page can show what it stands for.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ggtool.report.families import FAMILIES, family_of
from ggtool.report.numbers import digits, power_of_ten

INK, GRID, PAPER, SHADE = "#1a1c20", "#d9dbe0", "#ffffff", "#8a93a3"
FONT = "DejaVu Sans"  # travels with matplotlib
WIDTH = 7.2  # inches
_SMALL_TICK = 0.9e-3
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ggtool",
    "font.family": FONT,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
}
# A figure's own colours as variables of the page, which has a light and a dark set of them.
COLOURS = {
    INK: "--ink",
    GRID: "--grid",
    PAPER: "--paper",
    SHADE: "--shade",
    **{f.colour: f"--{f.key}" for f in FAMILIES},
}


@dataclass(frozen=True)
class Mark:
    """The format that a mark stands for, and the line to show beside it."""

    label: str
    tip: str


@dataclass
class Drawing:
    """A figure and its marks by id. `alt` describes it in words."""

    canvas: Canvas
    alt: str
    marks: dict[str, Mark] = field(default_factory=dict)

    def mark(self, label: str, tip: str) -> str:
        """Return a new id for a mark; pass it to matplotlib as gid."""
        name = f"mark{len(self.marks)}"
        self.marks[name] = Mark(label, tip)
        return name

    @cached_property
    def svg(self) -> str:
        """The figure as an SVG file, byte-identical on every call."""
        out = io.StringIO()
        with mpl.rc_context(_STYLE):
            self.canvas.savefig(out, format="svg", metadata={"Date": None})
        return out.getvalue()

    def inline_svg(self, name: str) -> str:
        """Return the SVG for inclusion in the page: ids begin with `name`, colours are the page's, marks carry their labels."""
        svg = self.svg[self.svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
        svg = re.sub(r'<g id="(mark\d+)">', lambda m: self._group(m[1]), svg)
        svg = re.sub(r'(\bid="|xlink:href="#|url\(#)(?=[^"]*)', rf"\g<1>{name}-", svg)
        for colour, variable in COLOURS.items():
            svg = svg.replace(colour, f"var({variable})")
        svg = svg.replace(f"'{FONT}'", "inherit")
        label = escape(self.alt, quote=True)
        return re.sub(
            r'<svg [^>]*viewBox="([^"]+)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', svg
        )

    @cached_property
    def png(self) -> bytes:
        """The figure as PNG, 160 pixels per inch."""
        out = io.BytesIO()
        with mpl.rc_context(_STYLE):
            self.canvas.savefig(out, format="png", dpi=160)
        return out.getvalue()

    def _group(self, mark: str) -> str:
        what = self.marks[mark]
        label, tip = escape(what.label, quote=True), escape(what.tip, quote=True)
        return f'<g id="{mark}" class="mark" data-format="{label}" data-tip="{tip}" tabindex="0">'


def new_drawing(
    alt: str, height: float, columns: int = 1, rows: int = 1, **layout: Any
) -> tuple[Drawing, list[Axes]]:
    """Return a drawing of WIDTH by `height` inches with its axes, row by row."""
    with mpl.rc_context(_STYLE):
        canvas = Canvas(figsize=(WIDTH, height), layout="constrained", facecolor=PAPER)
        axes = canvas.subplots(rows, columns, squeeze=False, **layout)
    flat: list[Axes] = list(axes.flat)
    for ax in flat:
        ax.set_facecolor(PAPER)
    return Drawing(canvas, alt), flat


def plain_ticks(axis: Any) -> None:
    """Write the ticks of a logarithmic axis as plain numbers, small ones as powers of ten; also 2 and 5 on a short axis.

    Call it after everything is drawn.
    """
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,), numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axis.set_minor_formatter(NullFormatter())


def _tick(value: float) -> str:
    if not 0 < value < _SMALL_TICK:
        return digits(value, 1)
    power = math.floor(math.log10(value) + 1e-9)
    times = round(value / 10**power)
    return power_of_ten(power) if times == 1 else f"{times}·{power_of_ten(power)}"


def rows_of_formats(ax: Axes, labels: Sequence[str]) -> None:
    """Give each format a row of `ax`, the first on top."""
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0)


def draw_bar(drawing: Drawing, ax: Axes, row: int, label: str, value: float, tip: str) -> None:
    """Draw a format's bar in its row."""
    ax.barh(row, value, height=0.66, color=family_of(label).colour)[0].set_gid(drawing.mark(label, tip))


def draw_span(ax: Axes, row: float, low: float, high: float, colour: str) -> None:
    """Draw an error bar along a row."""
    ax.plot([low, high], [row, row], color=colour, linewidth=1.2, solid_capstyle="butt")
    for end in (low, high):
        ax.plot([end, end], [row - 0.2, row + 0.2], color=colour, linewidth=1.2)


def draw_point(drawing: Drawing, ax: Axes, x: float, y: float, label: str, tip: str) -> None:
    """Draw a format's mark at a place."""
    family = family_of(label)
    (point,) = ax.plot([x], [y], family.marker, color=family.colour, markersize=6.5, markeredgecolor=PAPER)
    point.set_gid(drawing.mark(label, tip))


def font_files() -> dict[str, Path]:
    """Return the .ttf files of FONT that travel with matplotlib, by style."""
    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    return {
        "regular": folder / "DejaVuSans.ttf",
        "bold": folder / "DejaVuSans-Bold.ttf",
        "italic": folder / "DejaVuSans-Oblique.ttf",
        "mono": folder / "DejaVuSansMono.ttf",
    }
