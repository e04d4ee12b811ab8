"""How the weights of a tensor are distributed: range, moments, outliers, what is not finite, a histogram.

Two passes over the tensor, some rows at a time: the first finds range and mean, the second the rest around them. All
numbers are of the dequantized weights; NaN and infinities are counted and left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ggtool.gguf.header import TensorInfo
from ggtool.inspection.opened import Part, pieces
from ggtool.system.progress import Progress

T = TypeVar("T")

# Bins of the histogram over the whole range, and how many standard deviations make an outlier.
N_BINS = 64
OUTLIER_SIGMAS = 6.0


@dataclass(frozen=True)
class TensorStatistics:
    """Of one tensor. Moments are of the finite weights; skewness and kurtosis (excess) are 0 where all are equal.

    Attributes:
        n: all weights; n_nan, n_inf, n_zero: how many of them are that.
        n_outliers: weights further than OUTLIER_SIGMAS standard deviations from the mean.
        largest_sigmas: the farthest weight's distance from the mean in standard deviations.
        histogram: counts in N_BINS equal bins from minimum to maximum.

    """

    name: str
    type_name: str
    n: int
    n_nan: int
    n_inf: int
    n_zero: int
    minimum: float
    maximum: float
    mean: float
    std: float
    skewness: float
    kurtosis: float
    n_outliers: int
    largest_sigmas: float
    histogram: tuple[int, ...]

    @property
    def is_constant(self) -> bool:
        """Whether all finite weights are one number."""
        return self.minimum == self.maximum


def measure(part: Part, tensor: TensorInfo) -> TensorStatistics:
    """Read a tensor twice and return its statistics; raises what `ggtool.inspection.opened.pieces` raises."""
    first = _Range()
    for piece in pieces(part, tensor):
        first.add(piece)
    second = _Around(first.mean, first.minimum, first.maximum, first.n_bad > 0)
    if first.n_finite and first.minimum < first.maximum:
        for piece in pieces(part, tensor):
            second.add(piece)
    std = math.sqrt(second.powers[2] / first.n_finite) if first.n_finite else 0.0
    spread = max(first.maximum - first.mean, first.mean - first.minimum) if first.n_finite else 0.0
    n_outliers = 0
    if std and spread > OUTLIER_SIGMAS * std:
        n_outliers = sum(
            int(np.count_nonzero(np.abs(piece - np.float32(first.mean)) > OUTLIER_SIGMAS * std))
            for piece in pieces(part, tensor)
        )
    return TensorStatistics(
        name=tensor.name,
        type_name=tensor.type_name,
        n=first.n_finite + first.n_bad,
        n_nan=first.n_nan,
        n_inf=first.n_bad - first.n_nan,
        n_zero=first.n_zero,
        minimum=first.minimum if first.n_finite else math.nan,
        maximum=first.maximum if first.n_finite else math.nan,
        mean=first.mean if first.n_finite else math.nan,
        std=std,
        skewness=second.powers[3] / first.n_finite / std**3 if std else 0.0,
        kurtosis=second.powers[4] / first.n_finite / std**4 - 3 if std else 0.0,
        n_outliers=n_outliers,
        largest_sigmas=spread / std if std else 0.0,
        histogram=tuple(second.counts.tolist()),
    )


def measure_all(
    tensors: Sequence[tuple[TensorInfo, Part]], threads: int, progress: Progress = lambda done, total: None
) -> list[TensorStatistics]:
    """Measure several tensors on threads, in their order; progress counts bytes of tensors."""
    return in_threads(lambda tensor, part: measure(part, tensor), tensors, threads, progress)


def in_threads(
    work: Callable[[TensorInfo, Part], T],
    tensors: Sequence[tuple[TensorInfo, Part]],
    threads: int,
    progress: Progress = lambda done, total: None,
) -> list[T]:
    """Return what `work` makes of each tensor, in their order, some at once; progress counts bytes of tensors."""
    total, done = sum(tensor.n_bytes for tensor, _ in tensors), 0
    pool = ThreadPoolExecutor(threads, thread_name_prefix="tensors")
    try:
        futures = [pool.submit(work, tensor, part) for tensor, part in tensors]
        found = []
        for future, (tensor, _) in zip(futures, tensors, strict=True):
            found.append(future.result())
            done += tensor.n_bytes
            progress(done, total)
        return found
    finally:
        pool.shutdown(cancel_futures=True)


def histogram_line(counts: Sequence[int], width: int = 32) -> str:
    """Draw a histogram as one line of bars, `width` of them."""
    per = len(counts) // width
    bars = [sum(counts[at * per : (at + 1) * per]) for at in range(width)]
    most = max(bars, default=0)
    if not most:
        return ""
    # A bin that holds anything shows at least the lowest bar.
    return "".join(" " if not bar else "▁▂▃▄▅▆▇█"[min(7, bar * 8 // (most + 1))] for bar in bars)


class _Range:
    """The first pass."""

    def __init__(self) -> None:
        self.minimum, self.maximum, self.sum = math.inf, -math.inf, 0.0
        self.n_finite = self.n_bad = self.n_nan = self.n_zero = 0

    def add(self, piece: npt.NDArray[np.float32]) -> None:
        low, high = float(piece.min()), float(piece.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            nan = np.isnan(piece)
            finite = piece[np.isfinite(piece)]
            self.n_nan += int(np.count_nonzero(nan))
            self.n_bad += len(piece) - len(finite)
            piece = finite
            if not len(piece):
                return
            low, high = float(piece.min()), float(piece.max())
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self.sum += float(piece.sum(dtype=np.float64))
        self.n_finite += len(piece)
        self.n_zero += len(piece) - int(np.count_nonzero(piece))

    @property
    def mean(self) -> float:
        return self.sum / self.n_finite if self.n_finite else 0.0


class _Around:
    """The second pass: sums of powers of the distances from the mean, and the histogram."""

    def __init__(self, mean: float, minimum: float, maximum: float, has_bad: bool) -> None:
        self.mean, self.minimum, self.maximum, self.has_bad = mean, minimum, maximum, has_bad
        self.powers = {2: 0.0, 3: 0.0, 4: 0.0}
        self.counts = np.zeros(N_BINS, np.int64)

    def add(self, piece: npt.NDArray[np.float32]) -> None:
        if self.has_bad:
            piece = piece[np.isfinite(piece)]
        distances = piece.astype(np.float64) - self.mean
        squares = distances * distances
        self.powers[2] += float(squares.sum())
        self.powers[3] += float((squares * distances).sum())
        self.powers[4] += float((squares * squares).sum())
        scale = N_BINS / (self.maximum - self.minimum)
        bins = ((piece.astype(np.float64) - self.minimum) * scale).astype(np.int64)
        self.counts += np.bincount(np.minimum(bins, N_BINS - 1), minlength=N_BINS)
