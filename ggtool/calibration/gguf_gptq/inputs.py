"""Second moments of what flows into a layer: of the quantized model so far, and between it and the float model.

With x the float model's input, y the input when all before it is quantized, and a layer's float weights w, rounded weights q
make the mean squared error E (y q - x w)^2 = q H q' - 2 q G w' + w F w', where H is the mean of y y', G of y x' and F of x x'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

_N_SLICES = 4


@dataclass(frozen=True)
class Summary:
    """Moments of one layer's inputs: H, G and F (columns, columns), the means of y and x (columns,), all float32.

    F is None where no errors are asked for.
    """

    hessian: Tensor
    cross: Tensor
    original: Tensor | None
    mean: Tensor
    original_mean: Tensor

    def with_table(self, share: float) -> Summary:
        """Return the moments with those of a table of tokens, whose inputs pick a row out and are the same in both models.

        share: what an error costs there, over what it costs in an output matrix, on average.
        """
        cost = share * self.hessian.diagonal().mean() * torch.eye(len(self.hessian)).to(self.hessian)
        original = None if self.original is None else self.original + cost
        return replace(self, hessian=self.hessian + cost, cross=self.cross + cost, original=original)

    def errors(self, rounded: Tensor, weights: Tensor) -> Tensor:
        """Return each row's mean squared output error, float64 (rows,), of `rounded` weights for float `weights`."""
        assert self.original is not None
        # E (y q - x w)^2 with q = w + d: small terms alone, where the sum of the three products would cancel.
        difference = rounded - weights
        drift = self.hessian - self.cross  # of y (y - x)'
        rest = self.hessian - self.cross - self.cross.T + self.original
        terms = (difference @ self.hessian + 2 * (weights @ drift.T)) * difference + (
            weights @ rest
        ) * weights
        return terms.sum(1, dtype=torch.float64)


class Inputs:
    """Adds up moments chunk by chunk, of inputs less the mean of the first, whose large constant channels would swallow the rest."""

    def __init__(self, *, for_errors: bool = True) -> None:
        """Start with none; `for_errors` gathers what `Summary.errors` needs beside what a fit does."""
        self._for_errors = for_errors
        self._n_inputs = 0

    def add(self, quantized: Tensor, original: Tensor) -> None:
        """Add inputs (..., columns) of the same tokens in both models."""
        y, x = (one.reshape(-1, one.shape[-1]).to(torch.float32) for one in (quantized, original))
        if not self._n_inputs:
            self._shift = x.mean(0)
            self._hessian, self._cross = (x.new_zeros(2 * x.shape[-1:]) for _ in range(2))
            self._original = torch.zeros_like(self._hessian) if self._for_errors else None
            self._sums = x.new_zeros((2, x.shape[-1]), dtype=torch.float64)
        y, x = y - self._shift, x - self._shift
        _add_squares(self._hessian, y)
        self._cross.addmm_(y.T, x)
        if self._original is not None:
            _add_squares(self._original, x)
        self._sums += torch.stack([y.sum(0), x.sum(0)])
        self._n_inputs += len(y)

    @property
    def is_finite(self) -> bool:
        """Whether every number was finite."""
        return bool(self._hessian.isfinite().all() and self._sums.isfinite().all())

    def summary(self, *, centred: bool) -> Summary:
        """Return the moments; `centred` leaves the means out, for a layer whose bias makes up for them."""
        mean, original = (self._sums / self._n_inputs).to(torch.float32)

        def moments(sums: Tensor, one: Tensor, other: Tensor) -> Tensor:
            found = sums / self._n_inputs - torch.outer(one, other)
            return found if centred else found + torch.outer(one + self._shift, other + self._shift)

        return Summary(
            moments(_whole(self._hessian), mean, mean),
            moments(self._cross, mean, original),
            None if self._original is None else moments(_whole(self._original), original, original),
            mean + self._shift,
            original + self._shift,
        )


def _add_squares(sums: Tensor, x: Tensor) -> None:
    """Add x' x to the upper triangle of `sums`; below it some are added too."""
    # Whole squares would take twice as many products as the triangle, these slices a quarter more.
    bounds = [len(sums) * at // _N_SLICES for at in range(_N_SLICES + 1)]
    for start, stop in pairwise(bounds):
        sums[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])


def _whole(upper: Tensor) -> Tensor:
    return upper.triu() + upper.triu(1).T
