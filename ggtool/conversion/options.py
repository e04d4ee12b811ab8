"""Conversion options beyond the quant types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from ggtool.gguf.imatrix import ImportanceMatrix


@dataclass(frozen=True, kw_only=True)
class TypeRules:
    """llama-quantize's flags about tensor types; llama.cpp itself applies them.

    Attributes:
        tensor_types: (regular expression, tensor type); the first expression found in a tensor's name applies. Float
            quant types and tensors that llama.cpp never quantizes are not affected.
        output_tensor_type: of output.weight, or of the token embedding where that is the output too.
        token_embedding_type: of the token embedding; takes precedence over the others.
        pure: every tensor gets the quant type's main tensor type.
        leave_output_tensor: output.weight stays F32.

    """

    tensor_types: tuple[tuple[str, str], ...] = ()
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    pure: bool = False
    leave_output_tensor: bool = False


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything a caller can choose beside the quant types. The defaults give what llama-quantize gives.

    Attributes:
        rules: which tensor gets which type.
        imatrix: how much each weight matters; the quantizers weigh their errors with it.
        recipe: tensor -> tensor type, in place of the quant type's mix.
        name: general.name, in place of the checkpoint's.
        metadata: keys to add or to replace, as `ggtool.conversion.metadata_overrides` reads them.
        vocab_only: no tensors.
        split_max_bytes: most bytes of tensors in one file.
        rounded: tensor -> its data in place of what would be made of the checkpoint's: the bytes of all rows (uint8), or
            the values of a float tensor (float32). For one quant type at a time.
        method: in words how these were made, for `ImportanceMatrix.keys`.

    """

    rules: TypeRules = TypeRules()
    imatrix: ImportanceMatrix | None = None
    recipe: Mapping[str, str] | None = None
    name: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    vocab_only: bool = False
    split_max_bytes: int | None = None
    rounded: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    method: str = ""


NO_OPTIONS = Options()
