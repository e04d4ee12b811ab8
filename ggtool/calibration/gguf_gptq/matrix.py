"""Round one matrix to a GGUF tensor type so that the errors of its outputs are small, given its inputs' Hessian.

The error of a row is (q - w) H (q - w)', H the mean of x x' over inputs. Columns are rounded in order, block by block; each
error is fed into the columns behind it through the Cholesky factor of the inverse of H (GPTQ, arXiv 2210.17323). Scales and
minimums are llama.cpp's own fit, once of the original weights ("frozen") and once of the weights as they stand when the sweep reaches the block
("refitted"); the better of both is kept, row by row. Then a descent moves scales, minimums and codes for as long as the error falls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ggtool.conversion.ggml import quantize_rows
from ggtool.gguf.grids import GRIDS, Grid, Parts, split_rows, values
from ggtool.kernels import rounding

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

# Share of the mean of H's diagonal that is added to it.
_DAMPING = 0.01
_ROUNDS = 4
# Integer scales this far from a group's own are tried in the descent.
_REACH = 1
# A round that gains less than this share of all before it ends the descent.
_LEAST_GAIN = 0.01
# Columns that a sweep over frozen scales rounds before the rest of the matrix is told.
_LAZY_COLUMNS = 256


@dataclass(frozen=True)
class Costs:
    """What an error of a row costs.

    hessian: float32 (n_columns, n_columns), damped. factor: the upper U with U.T @ U its inverse.
    """

    hessian: Floats
    factor: Floats

    def errors(self, difference: Floats) -> Doubles:
        """Return the error of each row, (n_rows,), for a difference of weights (n_rows, n_columns)."""
        found: Doubles = np.einsum("ij,ij->i", difference @ self.hessian, difference, dtype=np.float64)
        return found


def costs(hessian: Floats) -> Costs:
    """Damp a Hessian, symmetric without an eigenvalue far below 0, and factorize it. Inputs that are always 0 get the damping alone."""
    exact = torch.from_numpy(hessian.astype(np.float64))
    share = _DAMPING * (float(exact.diagonal().mean()) or 1.0)
    same = torch.eye(len(exact), dtype=torch.float64)
    while True:
        damped = exact + share * same
        # The Cholesky factor of the inverse, of the matrix turned back to front: only a triangle is inverted.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            break
        share *= 10  # float32 sums can leave an eigenvalue slightly below 0
    factor = torch.linalg.solve_triangular(lower, same, upper=False).flip(0, 1)
    return Costs(damped.to(torch.float32).numpy(), factor.triu().to(torch.float32).contiguous().numpy())


def round_matrix(
    type_name: str, weights: Floats, cost: Costs, importance: Floats | None, threads: int
) -> Parts:
    """Round `weights` (n_rows, n_columns) to a tensor type of `GRIDS`.

    importance: float32 (n_columns,), what llama.cpp weighs the errors of the frozen fit with; None as llama.cpp without a matrix.
    """
    grid = GRIDS[type_name]
    frozen = split_rows(type_name, quantize_rows(type_name, weights, importance), weights.shape[1])
    swept = [
        _sweep(grid, weights, cost, frozen.copy(), threads, refit=False),
        _sweep(grid, weights, cost, frozen.copy(), threads, refit=True),
    ]
    return descend(grid, _better(grid, weights, cost, *swept), weights, cost, threads)


def descend(grid: Grid, parts: Parts, weights: Floats, cost: Costs, threads: int) -> Parts:
    """Move scales, minimums and codes for as long as the error falls; `parts` are changed and returned."""
    gradient: Floats = np.ascontiguousarray((values(grid, parts) - weights) @ cost.hessian, np.float32)
    for reach, n_rounds in ((0, _ROUNDS), (_REACH, 1), (0, _ROUNDS)):
        rounding.descend(
            grid,
            parts,
            gradient,
            cost.hessian,
            n_rounds=n_rounds,
            reach=reach,
            least=_LEAST_GAIN,
            threads=threads,
        )
    return parts


def _sweep(grid: Grid, weights: Floats, cost: Costs, parts: Parts, threads: int, *, refit: bool) -> Parts:
    n_columns = weights.shape[1]
    work = weights.copy()
    # What is left of a column's error after feedback goes with 1 / U[j, j]^2, so that is what its fit is weighed with.
    importance = (1 / np.square(cost.factor.diagonal())).astype(np.float32)
    step = grid.block if refit else min(_LAZY_COLUMNS, n_columns)
    for start in range(0, n_columns, step):
        stop = min(start + step, n_columns)
        if refit:
            _refit(grid, parts, work, importance, start)
        errors = rounding.feedback(grid, parts, work, cost.factor, start, stop, threads)
        if stop < n_columns:
            work[:, stop:] -= errors @ cost.factor[start:stop, stop:]
    return parts


def _refit(grid: Grid, parts: Parts, work: Floats, importance: Floats, start: int) -> None:
    """Replace the scales of the block at column `start` by llama.cpp's fit of the weights as they stand."""
    stop = start + grid.block
    piece = np.ascontiguousarray(work[:, start:stop])
    own = split_rows(
        grid.type_name, quantize_rows(grid.type_name, piece, importance[start:stop].copy()), grid.block
    )
    groups = slice(start // grid.group, stop // grid.group)
    parts.scales[:, groups], parts.minimums[:, groups] = own.scales, own.minimums
    parts.d[:, start // grid.block], parts.dmin[:, start // grid.block] = own.d[:, 0], own.dmin[:, 0]


def _better(grid: Grid, weights: Floats, cost: Costs, one: Parts, other: Parts) -> Parts:
    errors, others = (cost.errors(values(grid, parts) - weights) for parts in (one, other))
    rows = (errors <= others)[:, None]
    return replace(
        one,
        codes=np.where(rows, one.codes, other.codes),
        scales=np.where(rows, one.scales, other.scales),
        minimums=np.where(rows, one.minimums, other.minimums),
        d=np.where(rows, one.d, other.d),
        dmin=np.where(rows, one.dmin, other.dmin),
    )
