"""Find the matrices of a model, and those that a selector names.

A matrix is a weight that is multiplied with: every linear layer (nn.Linear, GPT-2's Conv1D, a packed or
bitsandbytes one) and the token embedding. An output head tied to the embedding is the same matrix, counted
once. Position embeddings, norms and biases do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ggtool.errors import UsageError
from ggtool.quantizers.linear import QuantizedEmbedding, QuantizedLinear
from ggtool.quantizers.selectors import matches

# Exactly these classes: a subclass may use its weight in a way that a packed module would not.
_REPLACEABLE = (nn.Linear, Conv1D, nn.Embedding)


@dataclass(frozen=True)
class Matrix:
    """One matrix and the modules that use it: names such as "transformer.h.0.attn.c_attn", table before head."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]

    @property
    def is_replaceable(self) -> bool:
        """Whether packed modules can take the place of all its users."""
        return all(type(module) in _REPLACEABLE for module in self.modules)

    @property
    def is_quantized(self) -> bool:
        """Whether it is held in fewer than 16 bits per weight."""
        module = self.modules[0]
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            return module.matrix.codes.element_size() < 2
        return cast(Tensor, module.weight).element_size() < 2


def find_matrices(model: PreTrainedModel) -> list[Matrix]:
    """Return every matrix of a tied model, float, packed or bitsandbytes, in the order of its modules."""
    table = model.get_input_embeddings()
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            users.setdefault(id(module.matrix), []).append((name, module))
        elif isinstance(module, nn.Linear | Conv1D) or module is table:
            users.setdefault(id(module.weight), []).append((name, module))
    return [Matrix(*zip(*found, strict=True)) for found in users.values()]


def select(matrices: list[Matrix], selector: str) -> list[Matrix]:
    """Return the replaceable matrices that `selector` names, by the grammar of `ggtool.quantizers.selectors`.

    Raises UsageError when it cannot be read or names nothing that can be replaced.
    """
    named = matches(selector, [matrix.names for matrix in matrices])
    chosen = [
        matrix for matrix, is_named in zip(matrices, named, strict=True) if is_named and matrix.is_replaceable
    ]
    if not chosen:
        raise UsageError(
            f"{selector!r} names no matrix that can be quantized from scratch; `ggtool formats --backend` lists them."
        )
    return chosen
