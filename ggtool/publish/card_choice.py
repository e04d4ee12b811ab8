"""Recommend when to choose which file, in one sentence each, from measured numbers alone.

Closeness to the original is the mean KL divergence where every measured file has one against the same reference, and
perplexity elsewhere. Two files count as different if they differ by more than the sum of their standard errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ggtool.publish.card_facts import CardFile, Measured, Row

# Perplexity of the first choice, at most this much above the best file's.
_FIRST_CHOICE_COST = 0.01
NOT_MEASURED = "–"


@dataclass(frozen=True)
class _Point:
    file: CardFile
    loss: float
    error: float
    ppl: float


def choices(measured: Measured) -> dict[str, str]:
    """Return {file name: when to choose it}; a dash for a file that was not measured."""
    said = {row.file.name: NOT_MEASURED for row in measured.rows}
    points = _points(measured.rows)
    if len(points) < 2:
        return said
    best = min(points, key=lambda point: point.loss)
    first = _first(points)
    smallest = min(points, key=lambda point: point.file.n_bytes)
    for point in points:
        said[point.file.name] = _sentence(point, points, best, first, smallest)
    return said


def first_choice(measured: Measured) -> CardFile:
    """Return the file to name in examples: the first choice, or of unmeasured ones Q4_K_M or what is nearest to it."""
    points = _points(measured.rows)
    if len(points) >= 2:
        return _first(points).file
    files = [row.file for row in measured.rows]
    return min(files, key=lambda file: (file.qtype != "Q4_K_M", abs(file.bpw - 4.85)))


def _first(points: Sequence[_Point]) -> _Point:
    """Return the smallest file whose perplexity is within 1 % of the lowest."""
    lowest = min(point.ppl for point in points)
    good = [point for point in points if point.ppl <= lowest * (1 + _FIRST_CHOICE_COST)]
    return min(good, key=lambda point: point.file.n_bytes)


def _points(rows: Sequence[Row]) -> list[_Point]:
    measured = [(row.file, row.quality) for row in rows if row.quality and row.quality.perplexity]
    references = {record.divergence.reference_sha256 if record.divergence else "" for _, record in measured}
    by_divergence = len(references) == 1 and "" not in references
    points = []
    for file, record in measured:
        ppl, far = record.perplexity, record.divergence
        assert ppl is not None
        if by_divergence and far is not None:
            points.append(_Point(file, far.kld_mean, far.kld_stderr, ppl.ppl))
        else:
            points.append(_Point(file, ppl.ppl, ppl.ppl_stderr, ppl.ppl))
    return points


def _sentence(point: _Point, points: Sequence[_Point], best: _Point, first: _Point, smallest: _Point) -> str:
    if better := _better(point, points):
        return f"Hardly: {better.file.label} is no larger and closer to the original."
    said = []
    if point is first:
        said.append(f"First choice: the smallest within 1 % of the lowest perplexity{_size(point, best)}.")
    if point is best:
        said.append("Closest to the original.")
    elif point is smallest:
        said.append(f"Smallest of those measured; perplexity {_change(point, best)} on {best.file.label}.")
    if not said:
        said.append(f"Perplexity {_change(point, best)} on {best.file.label}{_size(point, best)}.")
    return " ".join(said)


def _better(point: _Point, points: Sequence[_Point]) -> _Point | None:
    """Return a file that is no larger and clearly closer; of several the closest."""
    found = [
        other
        for other in points
        if other.file.n_bytes <= point.file.n_bytes and other.loss + other.error < point.loss - point.error
    ]
    return min(found, key=lambda other: other.loss, default=None)


def _change(point: _Point, best: _Point) -> str:
    return f"{100 * (point.ppl / best.ppl - 1):+.2f} %"


def _size(point: _Point, best: _Point) -> str:
    if point is best:
        return ""
    return f", {100 * point.file.n_bytes / best.file.n_bytes:.0f} % of its size"
