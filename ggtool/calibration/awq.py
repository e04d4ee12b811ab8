"""AWQ (arXiv 2306.00978): scale up the input channels with large activations before rounding.

The factor of a channel is the size of its inputs to a power that all channels share. The power is searched: it is the
one whose rounded weights change the layer's outputs least. Factors are folded into the layer before, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ggtool.calibration.folds import Fold, matrix
from ggtool.calibration.gptq import output_error
from ggtool.calibration.rounding import restore, round_weighted
from ggtool.quantizers.tables import TableQuantizer

_POWERS = tuple(step / 20 for step in range(21))
# Rows of each matrix that the search uses; more rows hardly change the power found.
_ROWS = 256
# Floor for a channel's input size, as a share of the largest: an unused channel would have factor 0.
_LEAST = 1e-4


def search_factors(fold: Fold, hessian: Tensor, second_moments: Tensor, quantizer: TableQuantizer) -> Tensor:
    """Return the factors (n_channels,), float32, that least change the consumers' outputs when these are rounded.

    hessian: (columns, columns), what an error in a row costs. second_moments: the mean square of each input channel
    (columns,). All ones if no factor helps.
    """
    weight = torch.cat([_some_rows(matrix(consumer)) for consumer in fold.consumers.values()])
    sizes = _per_channel(second_moments, fold).sqrt()
    sizes = sizes.clamp(min=_LEAST * float(sizes.max()))
    best, least = torch.ones_like(sizes), torch.inf
    for power in _POWERS if float(sizes.max()) > 0 else ():
        factors = sizes**power
        factors = factors / (factors.max() * factors.min()).sqrt()
        wide = factors[fold.channels]
        rounded = round_weighted(quantizer, weight * wide, hessian.diagonal() / wide.square())
        error = float(output_error(weight - restore(quantizer, *rounded) / wide, hessian).sum())
        if error < least:
            best, least = factors, error
    return best


def _per_channel(moments: Tensor, fold: Fold) -> Tensor:
    """Return the mean over the input channels that come from each of the producer's channels."""
    sums = moments.new_zeros(fold.n_channels).index_add_(0, fold.channels, moments)
    return sums / torch.bincount(fold.channels, minlength=fold.n_channels)


def _some_rows(weight: Tensor) -> Tensor:
    return weight[:: max(1, len(weight) // _ROWS)].to(torch.float32)
