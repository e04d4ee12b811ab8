"""First and second moments of a linear layer's inputs, accumulated chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Moments:
    """The first two moments of inputs x (columns,); layers with the same input share one.

    Sums are of x minus the mean of the first inputs: a large channel that hardly varies would lose its variance to rounding.
    """

    def __init__(self, n_columns: int, device: torch.device) -> None:
        self._squares = torch.zeros(n_columns, n_columns, device=device)
        self._total = torch.zeros(n_columns, dtype=torch.float64, device=device)
        self._shift = torch.zeros(n_columns, device=device)
        self._n_inputs = 0

    def add(self, x: Tensor) -> None:
        """Add inputs (..., columns)."""
        flat = x.reshape(-1, x.shape[-1]).to(torch.float32)
        if not self._n_inputs and len(flat):
            self._shift = flat.mean(0)
        flat = flat - self._shift
        self._squares.addmm_(flat.t(), flat)
        self._total += flat.sum(0)
        self._n_inputs += len(flat)

    def divide(self, factors: Tensor) -> None:
        """Rescale to the moments of inputs divided by `factors` (columns,)."""
        self._squares /= torch.outer(factors, factors)
        self._total /= factors
        self._shift /= factors

    @property
    def mean(self) -> Tensor:
        """Return the mean of x, float32 (columns,)."""
        return self._shift + self._rest

    @property
    def gram(self) -> Tensor:
        """Return the mean of x xᵀ, float32 (columns, columns): the cost of a squared error in W."""
        mean = self.mean
        return self.covariance + torch.outer(mean, mean)

    @property
    def covariance(self) -> Tensor:
        """Return the mean of (x - mean)(x - mean)ᵀ: what an error costs where a bias makes up for the mean."""
        covariance = self._squares / max(1, self._n_inputs) - torch.outer(self._rest, self._rest)
        covariance.diagonal().clamp_(min=0)
        return covariance

    @property
    def _rest(self) -> Tensor:
        return (self._total / max(1, self._n_inputs)).to(torch.float32)


@contextmanager
def observed(linears: Mapping[str, nn.Module]) -> Iterator[tuple[dict[str, Moments], Callable[[], None]]]:
    """Add up the inputs of linear layers by name while the block runs.

    The function that comes with the moments is to be called after each chunk.
    """
    found: dict[str, Moments] = {}
    heard: list[tuple[Tensor, Moments]] = []  # Keeps tensors alive so that identity checks stay valid.

    def listener(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hear(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            shared = next((moments for tensor, moments in heard if tensor is x), None)
            if shared is None:
                shared = found.get(name) or Moments(x.shape[-1], x.device)
                shared.add(x)
                heard.append((x, shared))
            found[name] = shared

        return hear

    handles = [module.register_forward_pre_hook(listener(name)) for name, module in linears.items()]
    try:
        yield found, heard.clear
    finally:
        for handle in handles:
            handle.remove()
