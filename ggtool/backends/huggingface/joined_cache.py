"""Caches of several texts, each of its own length, as one cache: for a step that takes every text one token further.

Each text's keys and values stay in its own cache. What attention is given are those of all texts, filled up at the end with
zeros to the longest, and a mask that leaves the zeros out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer


class JoinedCache(Cache):  # type: ignore[misc]  # transformers ships no types for it
    """One cache of a batch over `caches`, one for each row."""

    def __init__(self, caches: Sequence[DynamicCache]) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self._caches = caches

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append each row's keys and values (1, heads, 1, width) to its own cache; return those of all."""
        rows = [
            cache.update(key_states[row : row + 1], value_states[row : row + 1], layer_idx, *args, **kwargs)
            for row, cache in enumerate(self._caches)
        ]
        longest = max(keys.shape[-2] for keys, _ in rows)
        filled = [
            [pad(part, (0, 0, 0, longest - part.shape[-2])) for part in (keys, values)]
            for keys, values in rows
        ]
        return torch.cat([keys for keys, _ in filled]), torch.cat([values for _, values in filled])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens of the longest text."""
        return max(int(cache.get_seq_length(layer_idx)) for cache in self._caches)


def can_be_joined(cache: DynamicCache) -> bool:
    """Whether a cache that has been used holds all that was computed, in every layer: no sliding window, no other state."""
    return bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)


def step_mask(lengths: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    """Return the mask (texts, 1, 1, longest + 1) of a step behind texts of so many tokens: 0 where attention may look."""
    positions = torch.arange(max(lengths) + 1, device=device)
    hidden = positions[None] > torch.tensor(lengths, device=device)[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
    return mask.masked_fill(hidden, torch.finfo(dtype).min)[:, None, None]
