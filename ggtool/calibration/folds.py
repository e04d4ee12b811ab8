"""Find where a linear layer's input scaling can be folded: into the norm or the layer that produces its input.

W · diag(s) in the consumer and diag(1/s) in the producer cancel if nothing between them is in the way. Nothing is
looked up by architecture: each candidate is tried with uneven factors on real hidden states, and is a fold only if
the block's output stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# Attention mixes positions of a value channel, and a gate multiplies a channel of "up": a factor passes through both.
# The last part of a consumer's name: those of its producers, and how many of a producer's n outputs, the last of
# them, make the consumer's k inputs. Fused with queries and keys there are as many values as keys.
_THROUGH: Mapping[str, Mapping[str, Callable[[int, int], int]]] = {
    "c_proj": {"c_attn": lambda n, k: (n - k) // 2},
    "o_proj": {"v_proj": lambda n, k: n, "qkv_proj": lambda n, k: (n - k) // 2},
    "dense": {"v_proj": lambda n, k: n},
    "down_proj": {"up_proj": lambda n, k: n, "gate_up_proj": lambda n, k: n // 2},
}
# What a norm adds to its weight: nothing, or Gemma's 1.
_OFFSETS = (0.0, 1.0)
# Largest change of a block's output, relative to its maximum, that float32 rounding explains.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Fold:
    """Linear layers whose input scaling can be moved between them and the producer of their input.

    consumers: layers with the same input, by name. producer: a norm, or a linear layer whose last `n_channels`
    outputs they are. channels: for each input channel of the consumers, which of those it comes from. offset: what
    a norm adds to its weight before it multiplies.
    """

    consumers: Mapping[str, nn.Module]
    producer: nn.Module
    n_channels: int
    channels: Tensor
    offset: float = 0.0

    def apply(self, factors: Tensor) -> None:
        """Multiply the consumers' weights by `factors` (n_channels,) and divide the producer's outputs by them."""
        for consumer in self.consumers.values():
            matrix(consumer).mul_(factors[self.channels])
        if isinstance(self.producer, nn.Linear | Conv1D):
            matrix(self.producer)[-self.n_channels :].div_(factors[:, None])
        else:
            weight = cast(Tensor, self.producer.weight)
            weight.copy_((weight + self.offset) / factors - self.offset)
        bias = getattr(self.producer, "bias", None)
        if isinstance(bias, Tensor):
            bias[-self.n_channels :].div_(factors)


def matrix(linear: nn.Module) -> Tensor:
    """Return the weight of a Linear or Conv1D as (out_features, in_features), a view."""
    weight = cast(Tensor, linear.weight)
    return weight.t() if isinstance(linear, Conv1D) else weight


def find_folds(
    model: PreTrainedModel,
    block: nn.Module,
    groups: Sequence[Mapping[str, nn.Module]],
    run: Callable[[], Tensor],
) -> list[Fold]:
    """Return the folds of a float block that leave its output unchanged.

    groups: linear layers of it that share an input, by name. run: computes the block's output for some hidden
    state. Call it under `torch.no_grad()`.
    """
    original = run()
    candidates = [*_norms(block, groups, run), *_layers(model, groups)]
    return [fold for fold in candidates if _is_exact(fold, original, run)]


def _is_exact(fold: Fold, original: Tensor, run: Callable[[], Tensor]) -> bool:
    touched = [p for module in (*fold.consumers.values(), fold.producer) for p in module.parameters()]
    before = [parameter.clone() for parameter in touched]
    # Powers of 2, so that multiplying by one adds no rounding error.
    powers = torch.arange(fold.n_channels, device=original.device) * 7 % 5 - 2
    fold.apply(torch.exp2(powers.to(torch.float32)))
    changed = run()
    for parameter, value in zip(touched, before, strict=True):
        parameter.copy_(value)
    return bool((changed - original).abs().max() <= _TOLERANCE * original.abs().max())


def _norms(
    block: nn.Module, groups: Sequence[Mapping[str, nn.Module]], run: Callable[[], Tensor]
) -> Iterator[Fold]:
    """Yield the groups whose input is a norm's output, once for each offset that a norm may add to its weight."""
    made: list[tuple[nn.Module, Tensor]] = []
    taken: dict[nn.Module, Tensor] = {}

    def note_output(module: nn.Module, _inputs: Any, output: Any) -> None:
        made.append((module, output))

    def note_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        taken[module] = inputs[0]

    firsts = [next(iter(group.values())) for group in groups]
    handles = [norm.register_forward_hook(note_output) for norm in block.modules() if _is_norm(norm)]
    handles += [first.register_forward_pre_hook(note_input) for first in firsts]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    for group, first in zip(groups, firsts, strict=True):
        for norm, output in made:
            if output is taken.get(first):
                channels = torch.arange(output.shape[-1], device=output.device)
                yield from (Fold(group, norm, len(channels), channels, offset) for offset in _OFFSETS)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1


def _layers(model: PreTrainedModel, groups: Sequence[Mapping[str, nn.Module]]) -> Iterator[Fold]:
    """Yield the layers whose input is another layer's output, at most mixed over positions or multiplied elementwise."""
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for group in groups:
        (name, consumer), *others = group.items()
        parent, _, leaf = name.rpartition(".")
        siblings = dict(model.get_submodule(parent).named_children())
        for producer, part in _THROUGH.get(leaf, {}).items():
            found = siblings.get(producer)
            if others or not isinstance(found, nn.Linear | Conv1D):
                continue
            n_inputs, n_outputs = matrix(consumer).shape[1], matrix(found).shape[0]
            channels = _served(part(n_outputs, n_inputs), n_inputs, head_dim)
            if channels is not None:
                yield Fold(group, found, part(n_outputs, n_inputs), channels.to(matrix(found).device))


def _served(n_channels: int, n_inputs: int, head_dim: int) -> Tensor | None:
    """Return, for each of `n_inputs` channels, which of `n_channels` it comes from; None if they do not divide.

    Where there are fewer, each head of values serves several heads of queries in a row.
    """
    if n_channels == n_inputs:
        return torch.arange(n_inputs)
    if n_channels < head_dim or n_channels % head_dim or n_inputs % n_channels:
        return None
    heads = torch.arange(n_channels).view(-1, 1, head_dim)
    return heads.expand(-1, n_inputs // n_channels, head_dim).reshape(-1)
