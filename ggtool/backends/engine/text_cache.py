"""Keys and values of one text in float32 on a CPU: transformers' modules fill them, and the C++ step goes on behind."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ggtool.kernels.host_step import HostText

_FEWEST = 64  # positions that there is room for from the start; then twice as many each time


class _Layer(CacheLayerMixin):  # type: ignore[misc]  # transformers ships no types for it
    """Keys and values (1, heads, room, head_dim), of which `length` positions are used."""

    is_sliding = False
    is_croppable = True

    def __init__(self, n_heads: int, head_dim: int, most: int) -> None:
        super().__init__()
        self.keys, self.values = torch.empty(2, 1, n_heads, 0, head_dim)
        self.is_initialized = True
        self.length = 0
        self._most = most

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the sizes are known from the start."""

    def reserve(self, n: int) -> None:
        """Make room for `n` positions."""
        if n <= self.keys.shape[2]:
            return
        room = max(n, min(self._most, max(2 * self.keys.shape[2], _FEWEST)))
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], room, old.shape[3])
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (1, heads, n, head_dim); return all."""
        end = self.length + key_states.shape[2]
        self.reserve(end)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many positions a mask is for, and where they begin."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the positions that are used."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; as in transformers the number is negative."""
        self.length = max(0, self.length + tokens_to_remove)


class TextCache(Cache):  # type: ignore[misc]  # transformers ships no types for it
    """The cache of one text."""

    def __init__(self, n_layers: int, n_heads: int, head_dim: int, most: int) -> None:
        """Start empty; n_heads: of keys. Room grows by doubling, up to `most` tokens."""
        super().__init__(layers=[_Layer(n_heads, head_dim, most) for _ in range(n_layers)])
        self._sizes = n_layers, n_heads, head_dim, most

    def __deepcopy__(self, memo: dict[int, Any]) -> TextCache:
        """Return a cache of the same text with memory of its own, no more than it fills."""
        other = TextCache(*self._sizes)
        other.append([(layer.keys, layer.values) for layer in self.layers], self.length)
        memo[id(self)] = other
        return other

    @property
    def length(self) -> int:
        """Tokens whose keys and values are there."""
        return int(self.layers[0].length)

    def append(self, layers: list[tuple[Tensor, Tensor]], n: int) -> None:
        """Append the first `n` positions of each layer's keys and values (1, heads, positions, head_dim)."""
        for layer, (keys, values) in zip(self.layers, layers, strict=True):
            layer.update(keys[:, :, :n], values[:, :, :n])

    def with_token(self, token: int) -> HostText:
        """Return what the C++ step is told of a text that `token` is appended to; it is counted as appended."""
        n = self.length
        for layer in self.layers:
            layer.reserve(n + 1)
            layer.length = n + 1
        n_layers = len(self.layers)
        pointers = ctypes.c_void_p * n_layers
        return HostText(
            keys=pointers(*(layer.keys.data_ptr() for layer in self.layers)),
            values=pointers(*(layer.values.data_ptr() for layer in self.layers)),
            capacity=self.layers[0].keys.shape[2],
            position=n,
            token=token,
        )
