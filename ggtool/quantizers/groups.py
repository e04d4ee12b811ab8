"""Cut matrix rows into groups that each have a scale."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements per panel: small enough for a CPU's cache with a search's temporaries, large enough to fill a GPU.
_ELEMENTS_AT_ONCE = 1 << 18
_ELEMENTS_AT_ONCE_CUDA = 1 << 26


def pad_columns(weight: Tensor, group: int) -> Tensor:
    """Return `weight` (rows, columns), zero-padded to whole groups of columns."""
    missing = -weight.shape[1] % group
    return F.pad(weight, (0, missing)) if missing else weight


def row_panels(weight: Tensor) -> Iterator[Tensor]:
    """Yield panels of rows of `weight`, float32 (rows, columns)."""
    at_once = _ELEMENTS_AT_ONCE_CUDA if weight.is_cuda else _ELEMENTS_AT_ONCE
    step = max(1, at_once // weight.shape[1])
    for start in range(0, len(weight), step):
        yield weight[start : start + step].to(torch.float32)


def group_panels(weight: Tensor, group: int) -> Iterator[Tensor]:
    """Yield panels of rows of `weight`, float32 (rows, groups, group)."""
    for rows in row_panels(weight):
        yield pad_columns(rows, group).view(len(rows), -1, group)
