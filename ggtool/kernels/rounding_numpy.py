"""What `cpu/rounding.cpp` does, in numpy: all rows at once, column by column. For machines without a compiler, and for tests."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
# Columns that are moved before those behind them.
_PANEL = 256


class GridLike(Protocol):
    """A grid as `ggtool.gguf.grids.Grid` describes it."""

    @property
    def block(self) -> int:
        """Weights in a block."""
        ...

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        ...

    @property
    def levels(self) -> tuple[int, ...]:
        """The value of each code, ascending."""
        ...

    @property
    def scales(self) -> tuple[int, int]:
        """The least and the largest scale code."""
        ...

    @property
    def max_minimum(self) -> int:
        """The largest minimum code."""
        ...


class PartsLike(Protocol):
    """The numbers of rows as `ggtool.gguf.grids.Parts` holds them, C-contiguous; they are changed in place."""

    @property
    def codes(self) -> npt.NDArray[np.uint8]:
        """Codes (n_rows, n_columns)."""
        ...

    @property
    def scales(self) -> npt.NDArray[np.int16]:
        """Scale codes (n_rows, n_groups)."""
        ...

    @property
    def minimums(self) -> npt.NDArray[np.int16]:
        """Minimum codes (n_rows, n_groups)."""
        ...

    @property
    def d(self) -> Floats:
        """Scales of blocks (n_rows, n_blocks)."""
        ...

    @property
    def dmin(self) -> Floats:
        """Scales of the minimums (n_rows, n_blocks)."""
        ...


class _Moves:
    """The rows' numbers and the error's gradient (q - w) H; each move returns the error it takes away."""

    def __init__(self, grid: GridLike, parts: PartsLike, gradient: Floats, hessian: Floats) -> None:
        self._grid, self._parts, self._gradient, self._hessian = grid, parts, gradient, hessian
        self._levels = np.array(grid.levels, np.float32)
        self._per_block = grid.block // grid.group

    def round(self, reach: int) -> float:
        """Move the columns of one panel after the other."""
        n_columns, gained = self._gradient.shape[1], 0.0
        for begin in range(0, n_columns, _PANEL):
            columns = range(begin, min(begin + _PANEL, n_columns))
            gained += self._blocks(columns)
            gained += self._groups(columns, reach) if reach else 0.0
            gained += self._codes(columns)
        return gained

    def _codes(self, columns: range) -> float:
        gained = 0.0
        for column in columns:
            scale, minimum = scales_of(self._grid, self._parts, column // self._grid.group)
            codes = self._parts.codes[:, column]
            slope, curvature = self._gradient[:, column], self._hessian[column, column]
            now = scale * self._levels[codes] - minimum
            better = nearest(self._levels, now - slope / curvature, scale, minimum)
            step = scale * self._levels[better] - minimum - now
            change = step * (2 * slope + step * curvature)
            step[change >= 0] = 0
            gained -= float(change[step != 0].sum(dtype=np.float64))
            self._parts.codes[:, column] = np.where(step != 0, better, codes)
            self._gradient += np.outer(step, self._hessian[column])
        return gained

    def _groups(self, columns: range, reach: int) -> float:
        size = self._grid.group
        move = self._nested_group if self._per_block > 1 else self._plain_group
        return sum(move(group, reach) for group in range(columns.start // size, columns.stop // size))

    def _nested_group(self, group: int, reach: int) -> float:
        parts, (least, largest) = self._parts, self._grid.scales
        d, dmin = (part[:, group // self._per_block] for part in (parts.d, parts.dmin))
        old_scale, old_minimum = (part[:, group].copy() for part in (parts.scales, parts.minimums))
        own = range(-reach, reach + 1)
        trials = []
        for by in own:
            for minimum_by in own if self._grid.max_minimum else (0,):
                scale = np.clip(old_scale + by, least, largest)
                minimum = np.clip(old_minimum + minimum_by, 0, self._grid.max_minimum)
                trials.append((scale, minimum, *self._attempt(group, d * scale, dmin * minimum)))
        best, gained = self._take_best(group, [trial[2:] for trial in trials])
        for at, (scale, minimum, *_) in enumerate(trials):
            parts.scales[best == at, group] = scale[best == at]
            parts.minimums[best == at, group] = minimum[best == at]
        return gained

    def _plain_group(self, group: int, reach: int) -> float:
        d = self._parts.d[:, group].copy()
        zero = np.zeros_like(d)
        factors = [
            1.0,
            -1.0,
            *(1 + 0.01 * sign * step for step in range(1, 4 * reach + 1) for sign in (-1, 1)),
        ]
        others = [to_half(d * np.float32(factor)) for factor in factors]
        best, gained = self._take_best(group, [self._attempt(group, other, zero) for other in others])
        for at, other in enumerate(others):
            self._parts.d[best == at, group] = other[best == at]
        return gained

    def _attempt(
        self, group: int, scale: Floats, minimum: Floats
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.intp], Floats]:
        """Return by how much the error changes, the codes and the steps of the weights under other scales."""
        span = slice(group * self._grid.group, (group + 1) * self._grid.group)
        old_scale, old_minimum = scales_of(self._grid, self._parts, group)
        curvatures, slope = self._hessian[span, span], self._gradient[:, span].copy()
        codes = self._parts.codes[:, span].astype(np.intp)
        weight = old_scale[:, None] * self._levels[codes] - old_minimum[:, None]
        steps, change = np.zeros_like(weight), np.zeros(len(weight))
        for _ in range(2):
            for at in range(self._grid.group):
                now = weight[:, at] + steps[:, at]
                codes[:, at] = nearest(self._levels, now - slope[:, at] / curvatures[at, at], scale, minimum)
                step = scale * self._levels[codes[:, at]] - minimum - now
                change += step.astype(np.float64) * (2 * slope[:, at] + step * curvatures[at, at])
                steps[:, at] += step
                slope += np.outer(step, curvatures[at])
        return change, codes, steps

    def _take_best(
        self, group: int, trials: list[tuple[npt.NDArray[np.float64], npt.NDArray[np.intp], Floats]]
    ) -> tuple[npt.NDArray[np.intp], float]:
        """Take each row's best trial; return its number, -1 where none lowers the error, and what was gained."""
        span = slice(group * self._grid.group, (group + 1) * self._grid.group)
        changes = np.stack([change for change, _, _ in trials])
        best = changes.argmin(axis=0)
        lowest = changes.min(axis=0)
        best[lowest >= 0] = -1
        for at, (_, codes, steps) in enumerate(trials):
            rows = best == at
            self._parts.codes[rows, span] = codes[rows]
            self._gradient[rows] += steps[rows] @ self._hessian[span]
        return best, -float(lowest[best >= 0].sum())

    def _blocks(self, columns: range) -> float:
        size = self._grid.block
        return sum(self._block(block) for block in range(columns.start // size, columns.stop // size))

    def _block(self, block: int) -> float:
        grid, parts = self._grid, self._parts
        span = slice(block * grid.block, (block + 1) * grid.block)
        groups = slice(block * self._per_block, (block + 1) * self._per_block)
        curvatures, slope = self._hessian[span, span], self._gradient[:, span]
        scales, minimums = (
            np.repeat(part[:, groups].astype(np.float32), grid.group, axis=1)
            for part in (parts.scales, parts.minimums)
        )
        along_d, along_m = self._levels[parts.codes[:, span]] * scales, -minimums

        def product(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
            found: npt.NDArray[np.float64] = (one * other).sum(axis=1, dtype=np.float64)
            return found

        dd, dm, mm = (
            product(one, other @ curvatures)
            for one, other in ((along_d, along_d), (along_m, along_d), (along_m, along_m))
        )
        slope_d, slope_m = product(along_d, slope), product(along_m, slope)
        determinant = dd * mm - dm * dm
        both = (mm > 0) & (determinant > 1e-6 * dd * mm)
        safe = np.where(both, determinant, 1.0)
        alone = np.where(dd > 0, -slope_d / np.where(dd > 0, dd, 1.0), 0.0)
        step_d = np.where(both, (dm * slope_m - mm * slope_d) / safe, alone)
        step_m = np.where(both, (dm * slope_d - dd * slope_m) / safe, 0.0)
        d, dmin = parts.d[:, block], parts.dmin[:, block]
        new_d = to_half((d + step_d).astype(np.float32))
        new_dmin = to_half((dmin + step_m).astype(np.float32))
        step_d, step_m = new_d.astype(np.float64) - d, new_dmin.astype(np.float64) - dmin
        change = (
            2 * (step_d * slope_d + step_m * slope_m)
            + step_d**2 * dd
            + 2 * step_d * step_m * dm
            + step_m**2 * mm
        )
        taken = change < 0
        parts.d[taken, block], parts.dmin[taken, block] = new_d[taken], new_dmin[taken]
        steps = step_d[:, None] * along_d + step_m[:, None] * along_m
        self._gradient[taken] += steps[taken].astype(np.float32) @ self._hessian[span]
        return -float(change[taken].sum())


def feedback(
    grid: GridLike, parts: PartsLike, work: Floats, factor: Floats, errors: Floats, start: int, stop: int
) -> None:
    """See `ggtool.kernels.rounding.feedback`; fills `errors`."""
    levels = np.array(grid.levels, np.float32)
    for column in range(start, stop):
        scale, minimum = scales_of(grid, parts, column // grid.group)
        codes = nearest(levels, work[:, column], scale, minimum)
        parts.codes[:, column] = codes
        error = (work[:, column] - (scale * levels[codes] - minimum)) / factor[column, column]
        errors[:, column - start] = error
        work[:, column + 1 : stop] -= np.outer(error, factor[column, column + 1 : stop])


def descend(
    grid: GridLike,
    parts: PartsLike,
    gradient: Floats,
    hessian: Floats,
    n_rounds: int,
    reach: int,
    least: float,
) -> float:
    """See `ggtool.kernels.rounding.descend`."""
    moves = _Moves(grid, parts, gradient, hessian)
    total = 0.0
    for _ in range(n_rounds):
        gained = moves.round(reach)
        total += gained
        if gained <= least * total:
            break
    return total


def scales_of(grid: GridLike, parts: PartsLike, group: int) -> tuple[Floats, Floats]:
    """Return scale and minimum of one group of each row, float32 (n_rows,)."""
    block = group * grid.group // grid.block
    scale = parts.d[:, block] * parts.scales[:, group].astype(np.float32)
    return scale, parts.dmin[:, block] * parts.minimums[:, group].astype(np.float32)


def nearest(levels: Floats, weights: Floats, scale: Floats, minimum: Floats) -> npt.NDArray[np.intp]:
    """Return the code whose value is nearest to each weight; 0 where the scale is 0."""
    level = (weights + minimum) / np.where(scale == 0, np.float32(1), scale)
    if len(levels) > 1 and bool((np.diff(levels) == 1).all()):
        found = np.clip(np.rint(level - levels[0]), 0, len(levels) - 1).astype(np.intp)
    else:
        found = np.searchsorted((levels[1:] + levels[:-1]) / 2, level, side="left")
    return np.where(scale == 0, 0, found)


def to_half(values: Floats) -> Floats:
    """Round to what float16 can hold, at most its largest number."""
    limited: Floats = np.clip(values, -65504, 65504).astype(np.float16).astype(np.float32)
    return limited
