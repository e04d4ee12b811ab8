"""Cutting the rows of a matrix into groups that have scales of their own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements handled at once: on a CPU what a search makes beside them stays in a cache; a GPU wants work for all of it.
_ELEMENTS_AT_ONCE = 1 << 18
_ELEMENTS_AT_ONCE_CUDA = 1 << 26


def pad_columns(weight: Tensor, group: int) -> Tensor:
    """Return `weight` (rows, columns) with zeros behind, so that columns are whole groups."""
    missing = -weight.shape[1] % group
    return F.pad(weight, (0, missing)) if missing else weight


def row_panels(weight: Tensor) -> Iterator[Tensor]:
    """Yield some rows of `weight` after the other, float32 (rows, columns)."""
    at_once = _ELEMENTS_AT_ONCE_CUDA if weight.is_cuda else _ELEMENTS_AT_ONCE
    step = max(1, at_once // weight.shape[1])
    for start in range(0, len(weight), step):
        yield weight[start : start + step].to(torch.float32)


def group_panels(weight: Tensor, group: int) -> Iterator[Tensor]:
    """Yield some rows of `weight` after the other, float32 (rows, groups, group)."""
    for rows in row_panels(weight):
        yield pad_columns(rows, group).view(len(rows), -1, group)
