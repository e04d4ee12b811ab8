"""Whether a GGUF file holds the weights of a checkpoint, or of another file, as far as its quant type lets that be seen.

Norms are compared exactly: every quant type leaves them in float, and training moves them. Matrices are compared by
their relative error on sampled rows, |stored - original| / |original|, which may be four times what a plain rounding
to as many bits causes: error feedback moves weights in directions that its inputs do not take, other weights lie apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from ggtool.conversion.architectures import find_architecture
from ggtool.conversion.model import read_model
from ggtool.conversion.quantization_error import energy_of, round_trip, sampled_runs
from ggtool.conversion.stored_rows import NOT_WEIGHTS, n_rows, rows_between
from ggtool.conversion.tensors import ModelTensor
from ggtool.gguf.header import TensorInfo
from ggtool.gguf.model import FLOAT_TENSOR_TYPES, Artifact, is_matrix
from ggtool.source.resolve import ModelSource

Floats = npt.NDArray[np.float32]

# Plain rounding to b bits per weight has a relative error of some 0.8 * 2 ** (1 - b), from Q8_0 to IQ1_S. Error feedback
# took it to 2.7 * 2 ** (1 - b), in the token table of a small GPT-2 at Q6_K.
_MOST_TIMES = 4.0
# Below 1.41, which is what unrelated weights of the same size have.
_MOST_ERROR = 0.9
# What storing a checkpoint in bfloat16 costs; a float file of the same weights has no more.
_LEAST_ERROR = 0.004


def other_than_source(artifact: Artifact, source: ModelSource) -> str | None:
    """Return what of a file is not the checkpoint's, in words that follow "other weights:"; None if nothing is.

    Raises SourceError for a checkpoint that cannot be read; `is_comparable` says which can be.
    """
    tensors = {tensor.name: tensor for tensor in read_model(source).tensors}
    stored = {tensor.name: tensor for tensor in artifact.header.tensors}
    n_mine, n_theirs = _n_blocks(stored), _n_blocks(tensors)
    if n_mine != n_theirs:
        return f"it has {n_mine} blocks and not {n_theirs}"
    both = [name for name in tensors if name in stored and stored[name].type_name not in NOT_WEIGHTS]
    for name in both:
        if tensors[name].shape != stored[name].shape:
            return f"{name} is {stored[name].shape} and not {tensors[name].shape}"
    norms = {name: tensors[name].rows(0, tensors[name].n_rows) for name in both if _is_norm(name)}
    if found := other_norm(norms_of(artifact), norms):
        return found
    for name in both:
        if is_matrix(name, tensors[name].shape) and _is_far(artifact, stored[name], tensors[name]):
            return f"{name} is farther from the checkpoint's than {stored[name].type_name} takes it"
    return None


def is_comparable(source: ModelSource) -> bool:
    """Whether a checkpoint's tensors can be had under their GGUF names without llama.cpp's converter."""
    return find_architecture(source.config) is not None


def norms_of(artifact: Artifact) -> dict[str, Floats]:
    """Read a file's norms as float32, by name."""
    return {
        tensor.name: rows_between(artifact, tensor, 0, n_rows(tensor.shape))
        for tensor in artifact.header.tensors
        if _is_norm(tensor.name) and tensor.type_name in FLOAT_TENSOR_TYPES - NOT_WEIGHTS
    }


def other_norm(first: Mapping[str, Floats], second: Mapping[str, Floats]) -> str | None:
    """Return the first norm of both that is not the same, in words; one stored in half precision is the same."""
    for name in sorted(first.keys() & second.keys()):
        if first[name].shape != second[name].shape or not _is_same(first[name], second[name]):
            return f"{name} differs, and no quant type changes a norm"
    return None


def _n_blocks(names: Iterable[str]) -> int:
    return len({name.split(".")[1] for name in names if name.startswith("blk.")})


def _is_norm(name: str) -> bool:
    return name.endswith(("_norm.weight", "_norm.bias"))


def _is_same(a: Floats, b: Floats) -> bool:
    return any(
        np.array_equal(round_trip(kind, x, None), y)
        for x, y in ((a, b), (b, a))
        for kind in ("F32", "F16", "BF16")
    )


def _is_far(artifact: Artifact, stored: TensorInfo, tensor: ModelTensor) -> bool:
    weights = np.ones(tensor.n_per_row, np.float32)
    energy = error = 0.0
    for begin, end, _ in sampled_runs(tensor, None):
        rows = tensor.rows(begin, end)
        energy += energy_of(rows, weights)
        error += energy_of(rows_between(artifact, stored, begin, end) - rows, weights)
    tensor.source.release()
    bits = 8 * stored.n_bytes / stored.n_params
    most = min(_MOST_ERROR, max(_LEAST_ERROR, _MOST_TIMES * 2 ** (1 - bits)))
    return error > most**2 * energy
