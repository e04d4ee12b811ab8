"""Round one layer: correct its target for the error before it, round, and keep llama.cpp's own bytes where they are better.

Fitted on most calibration chunks; what is kept is decided on the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ggtool.calibration.blocks import refuse_not_finite
from ggtool.calibration.gguf_gptq.inputs import Inputs, Summary
from ggtool.calibration.gguf_gptq.matrix import Costs, costs
from ggtool.calibration.gguf_gptq.rounded import refine_bytes, round_bytes
from ggtool.conversion.ggml import dequantize_rows, quantize_rows

Floats = npt.NDArray[np.float32]
# Strengths of the correction for the error of what comes before.
_STRENGTHS = (0.0, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Rounded:
    """A matrix as it goes into the file.

    Attributes:
        data: its bytes, row after row. weights: what llama.cpp makes of them, float32 (n_rows, n_columns).
        bias: the corrected bias, where there is one. strength: of the target's correction.
        error, stock_error: mean squared output error on the chunks it was not fitted on, ours and of llama.cpp's own rounding,
            or of the file that was refined.

    """

    data: npt.NDArray[np.uint8]
    weights: Floats
    bias: Floats | None
    strength: float
    error: float
    stock_error: float

    @property
    def facts(self) -> dict[str, float]:
        """What the recipe records of it."""
        return {
            "improved": not self.is_stock,
            "correction": self.strength,
            "error": self.error,
            "error_before": self.stock_error,
        }

    @property
    def is_stock(self) -> bool:
        """Whether llama.cpp's own bytes, or those of the file, were kept."""
        return not self.error < self.stock_error


@dataclass(frozen=True)
class Moments:
    """One input's moments on the chunks to fit on, and on those to judge by. Layers with the same input share them."""

    fitted: Inputs
    judged: Inputs
    _prepared: dict[tuple[bool, float], Prepared] = field(default_factory=dict, repr=False)

    def check(self, name: str) -> None:
        """Raise MeasureError unless all inputs were finite."""
        refuse_not_finite(name, is_finite=self.fitted.is_finite and self.judged.is_finite)

    def prepared(self, *, centred: bool, table_share: float) -> Prepared:
        """Return what is computed of them once for all layers that share the input.

        See `Inputs.summary` and `Summary.with_table`.
        """
        key = (centred, table_share)
        if key not in self._prepared:
            fitted, judged = (
                one.summary(centred=centred).with_table(table_share) for one in (self.fitted, self.judged)
            )
            self._prepared[key] = Prepared(fitted, judged, costs(fitted.hessian.cpu().numpy()))
        return self._prepared[key]


@dataclass(frozen=True)
class Prepared:
    """Both summaries and the costs of an error."""

    fitted: Summary
    judged: Summary
    cost: Costs


def round_layer(
    type_name: str,
    weights: Floats,
    bias: Floats | None,
    moments: Moments,
    importance: Floats | None,
    threads: int,
    table_share: float = 0.0,
    present: npt.NDArray[np.uint8] | None = None,
) -> Rounded:
    """Round `weights` (n_rows, n_columns); importance: what llama.cpp weighs its own rounding with, float32 (n_columns,).

    table_share: of a matrix that is the table of tokens too, what an error costs there; see `Summary.with_table`.
    present: bytes of a file that is there, to be refined: they take the place of llama.cpp's, and nothing is rounded anew.
    """
    known = moments.prepared(centred=bias is not None, table_share=table_share)
    fitted, judged, cost = known.fitted, known.judged, known.cost
    exact = torch.from_numpy(weights).to(fitted.hessian)
    strength, target = _target(exact, known)
    aim = target.cpu().numpy()
    if present is None:
        stock = quantize_rows(type_name, weights, importance)
        ours = round_bytes(type_name, aim, cost, importance, threads)
    else:
        stock = present
        ours = refine_bytes(type_name, stock, aim, cost, threads)
    widened = [dequantize_rows(type_name, data, weights.shape[1]) for data in (ours, stock)]
    error, stock_error = (
        float(judged.errors(torch.from_numpy(one).to(exact), exact).sum()) for one in widened
    )
    better = error < stock_error
    data, kept = (ours, widened[0]) if better else (stock, widened[1])
    if bias is not None:
        bias = bias + _shift(exact, torch.from_numpy(kept).to(exact), fitted)
    return Rounded(data, kept, bias, strength, error, stock_error)


def _target(weights: Tensor, known: Prepared) -> tuple[float, Tensor]:
    """Return the strength of correction that serves the unfitted chunks best, and the weights to be rounded."""
    fitted, judged = known.fitted, known.judged
    # The error of y q is least, for q that need not be rounded, at w + w (G - H)' inverse(H).
    factor = torch.from_numpy(known.cost.factor).to(weights)
    step = weights @ (fitted.cross - fitted.hessian).T @ factor.T @ factor
    tried = {one: float(judged.errors(weights + one * step, weights).sum()) for one in _STRENGTHS}
    strength = min(tried, key=lambda one: tried[one])
    return strength, weights + strength * step


def _shift(weights: Tensor, rounded: Tensor, fitted: Summary) -> Floats:
    """Return what the rounded layer's outputs lack on average, (n_rows,)."""
    found: Floats = (weights @ fitted.original_mean - rounded @ fitted.mean).cpu().numpy()
    return found
