"""The two figures of a model card: size against divergence or perplexity, and speed; PNG and SVG.

The same records give the same bytes, so that a second push sends no figure again.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ggtool.publish.card_facts import Measured, Row
from ggtool.report.device import device_name
from ggtool.report.disturbed import mark

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = "figures"
# Okabe and Ito's colours, which stay apart for the colour-blind.
_BLUE, _ORANGE = "#0072B2", "#D55E00"
_MB = 10**6


def draw(measured: Measured) -> Mapping[str, bytes]:
    """Return {path below the folder: content} of what the records allow to draw; nothing from nothing."""
    figures: dict[str, Figure] = {}
    if sum(row.quality is not None for row in measured.rows) >= 2:
        figures["quality"] = _quality(measured)
    if sum(row.speed is not None for row in measured.rows) >= 2:
        figures["speed"] = _speed(measured)
    return {
        f"{FOLDER}/{name}.{kind}": _save(figure, kind)
        for name, figure in figures.items()
        for kind in ("png", "svg")
    }


def _quality(measured: Measured) -> Figure:
    rows = [row for row in measured.rows if row.quality is not None]
    by_divergence = all(row.quality is not None and row.quality.divergence is not None for row in rows)
    figure, axes = _blank("Size and closeness to the original" if by_divergence else "Size and perplexity")
    for row in rows:
        value, error = _value(row, by_divergence=by_divergence)
        size = row.file.n_bytes / _MB
        axes.errorbar(size, value, yerr=error, fmt="o", color=_BLUE, ecolor=_ORANGE, capsize=3)
        axes.annotate(row.file.label, (size, value), xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set_xlabel("file size, MB")
    axes.set_ylabel("mean KL divergence, nats" if by_divergence else "perplexity")
    if by_divergence and all(_value(row, by_divergence=True)[0] > 0 for row in rows):
        axes.set_yscale("log")
    axes.margins(0.15)
    return figure


def _value(row: Row, *, by_divergence: bool) -> tuple[float, float]:
    assert row.quality is not None
    if by_divergence and row.quality.divergence is not None:
        return row.quality.divergence.kld_mean, row.quality.divergence.kld_stderr
    assert row.quality.perplexity is not None
    return row.quality.perplexity.ppl, row.quality.perplexity.ppl_stderr


def _speed(measured: Measured) -> Figure:
    rows = [row for row in measured.rows if row.speed is not None][::-1]
    figure, axes = _blank("Generation speed")
    for at, row in enumerate(rows):
        assert row.speed is not None
        assert row.speed.speed is not None
        timed = row.speed.speed
        low, high = timed.tg_ts_p5 or timed.tg_ts, timed.tg_ts_p95 or timed.tg_ts
        spread = [[max(timed.tg_ts - low, 0)], [max(high - timed.tg_ts, 0)]]
        axes.barh(at, timed.tg_ts, xerr=spread, color=_BLUE, ecolor=_ORANGE, capsize=3)
    devices = {device_name(row.speed) for row in rows if row.speed}
    labels = [
        f"{row.file.label} {mark(row.speed)}".rstrip()
        + (f"\n{device_name(row.speed)}" if len(devices) > 1 else "")
        for row in rows
        if row.speed
    ]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_xlabel("tokens a second, median; bars from the 5th to the 95th percentile")
    return figure


def _blank(title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Figure, kind: str) -> bytes:
    import matplotlib

    file = io.BytesIO()
    # No date and no random ids, so that the same numbers give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "ggtool", "svg.fonttype": "none"}):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(file, format=kind, dpi=120, metadata=metadata)
    return file.getvalue()
