"""Place point labels without overlap: each takes the first free position around its point, or is left out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

# (dx, dy) in points from the mark, and the text's alignment.
_PLACES = (
    (7, 0, "left", "center"),
    (-7, 0, "right", "center"),
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
    (6, 6, "left", "bottom"),
    (6, -6, "left", "top"),
    (-6, 6, "right", "bottom"),
    (-6, -6, "right", "top"),
    (9, 14, "left", "bottom"),
    (9, -14, "left", "top"),
    (-9, 14, "right", "bottom"),
    (-9, -14, "right", "top"),
)
_SIZE = 7.5
_CHARACTER, _LINE = 0.60 * _SIZE, 1.15 * _SIZE  # about, in DejaVu Sans
_POINT = 4.0


def label_points(
    ax: Axes, points: Sequence[tuple[float, float, str]], line: Sequence[tuple[float, float]] = ()
) -> None:
    """Place labels (x, y, text) beside their points in order of priority, clear of the `line` through points (x, y).

    Call it after the axes have their limits.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout decides where points are
    scale = 72 / figure.dpi
    places = [ax.transData.transform((x, y)) * scale for x, y, _ in points]
    taken = [Bbox.from_extents(x - _POINT, y - _POINT, x + _POINT, y + _POINT) for x, y in places]
    corners = [ax.transData.transform(place) * scale for place in line]
    taken += [box for start, end in pairwise(corners) for box in _along(start, end)]
    inside = Bbox(ax.get_window_extent().get_points() * scale)
    for (x, y, text), (px, py) in zip(points, places, strict=True):
        for dx, dy, across, up in _PLACES:
            box = _box(px + dx, py + dy, len(text) * _CHARACTER, across, up)
            if not inside.contains(box.x0, box.y0) or not inside.contains(box.x1, box.y1):
                continue
            if any(box.overlaps(other) for other in taken):
                continue
            taken.append(box)
            ax.annotate(text, (x, y), (dx, dy), textcoords="offset points", ha=across, va=up, fontsize=_SIZE)
            break


def _along(start: Any, end: Any) -> list[Bbox]:
    """Return small boxes along the segment between two positions in points, one character apart."""
    n = max(2, int(max(abs(end - start)) / _CHARACTER))
    way = [start + (end - start) * i / n for i in range(1, n)]
    return [Bbox.from_extents(x - 0.5, y - 0.5, x + 0.5, y + 0.5) for x, y in way]


def _box(x: float, y: float, width: float, across: str, up: str) -> Bbox:
    left = {"left": x, "center": x - width / 2, "right": x - width}[across]
    bottom = {"bottom": y, "center": y - _LINE / 2, "top": y - _LINE}[up]
    return Bbox.from_extents(left, bottom, left + width, bottom + _LINE)
