"""Second moments of what flows into a layer: of the quantized model so far, and between it and the float model.

With x the float model's input, y the input when all before it is quantized, and a layer's float weights w, rounded weights q
make the mean squared error E (y q - x w)^2 = q H q' - 2 q G w' + w F w', where H is the mean of y y', G of y x' and F of x x'.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Summary:
    """Moments of one layer's inputs: H, G and F (columns, columns), the means of y and x (columns,), all float32."""

    hessian: Tensor
    cross: Tensor
    original: Tensor
    mean: Tensor
    original_mean: Tensor

    def errors(self, rounded: Tensor, weights: Tensor) -> Tensor:
        """Return each row's mean squared output error, float64 (rows,), of `rounded` weights for float `weights`."""
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

    def __init__(self) -> None:
        self._n_inputs = 0

    def add(self, quantized: Tensor, original: Tensor) -> None:
        """Add inputs (..., columns) of the same tokens in both models."""
        y, x = (one.reshape(-1, one.shape[-1]).to(torch.float32) for one in (quantized, original))
        if not self._n_inputs:
            self._shift = x.mean(0)
            self._hessian, self._cross, self._original = (x.new_zeros(2 * x.shape[-1:]) for _ in range(3))
            self._sums = x.new_zeros((2, x.shape[-1]), dtype=torch.float64)
        y, x = y - self._shift, x - self._shift
        self._hessian.addmm_(y.T, y)
        self._cross.addmm_(y.T, x)
        self._original.addmm_(x.T, x)
        self._sums += torch.stack([y.sum(0), x.sum(0)])
        self._n_inputs += len(y)

    @property
    def is_finite(self) -> bool:
        """Whether every number was finite."""
        return bool(self._hessian.isfinite().all() and self._original.isfinite().all())

    def summary(self, *, centred: bool) -> Summary:
        """Return the moments; `centred` leaves the means out, for a layer whose bias makes up for them."""
        mean, original = (self._sums / self._n_inputs).to(torch.float32)
        found = [
            sums / self._n_inputs - torch.outer(one, other)
            for sums, one, other in (
                (self._hessian, mean, mean),
                (self._cross, mean, original),
                (self._original, original, original),
            )
        ]
        mean, original = mean + self._shift, original + self._shift
        if not centred:
            pairs = ((mean, mean), (mean, original), (original, original))
            found = [one + torch.outer(*pair) for one, pair in zip(found, pairs, strict=True)]
        return Summary(found[0], found[1], found[2], mean, original)
