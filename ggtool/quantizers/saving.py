"""Save a packed model and load it back bit-equal: codes and scales, nothing dequantized.

Matrices are stored as NAME.codes and NAME.scales, where NAME is the first module that uses one; other
parameters under their own names. A float tensor that fits float16 exactly is stored as float16.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ggtool import __version__
from ggtool.errors import ArtifactError, OutputError
from ggtool.quantizers import QUANTIZERS, QuantizedTensor, Quantizer, load_attribute
from ggtool.quantizers.linear import PackedMatrix, QuantizedEmbedding, QuantizedLinear
from ggtool.quantizers.matrices import Matrix, find_matrices
from ggtool.quantizers.packed import fill, install
from ggtool.quantizers.pretrained import Device, has_own_head, refuse_misfits, skeleton
from ggtool.quantizers.saved_folder import (
    CONFIG_KEY,
    CONFIG_NAME,
    TOKENIZER_FILES,
    PackedFacts,
    QuantizedFacts,
    is_quantized_folder,
    read_facts,
)
from ggtool.source.safetensors import SINGLE_NAME, LazyTensor, open_checkpoint
from ggtool.system.atomic import atomic_folder
from ggtool.system.files import read_json

_SCRATCH = "scratch-"


def save_quantized(
    model: PreTrainedModel,
    path: Path,
    facts: QuantizedFacts,
    original: Path,
    *,
    force: bool = False,
    texts: Mapping[str, str] = MappingProxyType({}),
) -> QuantizedFacts:
    """Write `model`, whose matrices are packed, as the folder `path`; config and tokenizer come from `original`.

    The folder appears whole or not at all; `force` replaces one that this function wrote. texts: what else goes
    into it, content by file name. Returns `facts` with the versions and matrices that were stored. Raises OutputError.
    """
    tensors, matrices = _tensors(model)
    facts = replace(facts, versions=_versions(), matrices=matrices)
    config = {**read_json(original / CONFIG_NAME), CONFIG_KEY: facts.to_json()}
    if has_own_head(original):
        config["tie_word_embeddings"] = False  # what the original's config left unsaid
    with atomic_folder(path, force=force, is_ours=is_quantized_folder) as folder:
        save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})
        for name in TOKENIZER_FILES:
            if (original / name).is_file():
                shutil.copyfile(original / name, folder / name)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return facts


def load_quantized(path: Path, device: Device = "cpu") -> PreTrainedModel:
    """Return the model that `save_quantized` wrote to `path`, every tensor bit-identical.

    Tensors are read one by one, so peak memory is the packed model plus the largest tensor. Raises
    ArtifactError or SourceError when the folder is damaged, of a newer schema or of another kind.
    """
    facts = read_facts(path)
    model = skeleton(path)
    tensors = open_checkpoint(path)
    matrices = {matrix.names: matrix for matrix in find_matrices(model)}
    for stored in facts.matrices:
        matrix = matrices.pop(stored.names, None)
        if matrix is None or not matrix.is_replaceable:
            raise ArtifactError(f"{path}: the model of its config has no matrix {stored.names[0]}.")
        install(model, matrix, _read_matrix(path, stored, matrix, tensors, device))
    names = {name for name, _ in model.named_parameters()}
    refuse_misfits(path, sorted(names - tensors.keys()), sorted(tensors.keys() - names))
    for name, tensor in tensors.items():
        _check(path, tensor, tuple(model.get_parameter(name).shape), ("F16", "F32"))
    fill(model, tensors, device)
    return model.to(device)


def make_quantizer(name: str) -> Quantizer:
    """Return the from-scratch quantizer of a QUANTIZERS row; ArtifactError for an unknown name."""
    if name not in QUANTIZERS or not name.startswith(_SCRATCH):
        raise ArtifactError(f"no from-scratch quantizer is called {name!r}; update ggtool.")
    return cast(Callable[[], Quantizer], load_attribute(name))()


def quantizer_name(quantizer: Quantizer) -> str:
    """Return the row of QUANTIZERS that makes a quantizer of this class and these settings."""
    for name in QUANTIZERS:
        if name.startswith(_SCRATCH):
            candidate = make_quantizer(name)
            if type(candidate) is type(quantizer) and vars(candidate) == vars(quantizer):
                return name
    raise OutputError(
        f"a {type(quantizer).__name__} with settings of its own cannot be saved; give it a row."
    )


def _tensors(model: PreTrainedModel) -> tuple[dict[str, Tensor], tuple[PackedFacts, ...]]:
    tensors: dict[str, Tensor] = {}
    facts = []
    for matrix in find_matrices(model):
        module = matrix.modules[0]
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            packed = module.matrix
            facts.append(PackedFacts(matrix.names, quantizer_name(packed.quantizer), packed.shape))
            tensors[f"{matrix.names[0]}.codes"] = _whole(packed.codes)
            tensors[f"{matrix.names[0]}.scales"] = _whole(packed.scales)
    for name, parameter in model.named_parameters():  # a tied one once, as `fill` expects it
        tensors[name] = _narrowed(name, parameter.detach())
    return tensors, tuple(facts)


def _whole(tensor: Tensor) -> Tensor:
    """Return a tensor ready to be stored; one row of a tensor whose rows are all one expanded row."""
    return (tensor[:1] if _is_shared(tensor) else tensor).cpu().contiguous()


def _is_shared(tensor: Tensor) -> bool:
    return len(tensor) > 1 and tensor.stride(0) == 0


def _narrowed(name: str, tensor: Tensor) -> Tensor:
    if not tensor.isfinite().all():
        raise OutputError(f"{name} holds a weight that is not finite; nothing was saved.")
    wide = tensor.cpu().to(torch.float32).contiguous()
    narrow = wide.to(torch.float16)
    return narrow if torch.equal(narrow.to(torch.float32), wide) else wide


def _versions() -> dict[str, str]:
    return {"ggtool": __version__, "torch": torch.__version__, "transformers": version("transformers")}


def _read_matrix(
    path: Path, stored: PackedFacts, matrix: Matrix, tensors: dict[str, LazyTensor], device: Device
) -> PackedMatrix:
    """Remove a matrix's codes and scales from `tensors` and check them against the model and the quantizer."""
    name, (rows, columns) = stored.names[0], stored.shape
    shape = tuple(cast(Tensor, matrix.modules[0].weight).shape)
    if stored.shape != (shape[::-1] if isinstance(matrix.modules[0], Conv1D) else shape):
        raise ArtifactError(f"{path}: matrix {name} is {rows} x {columns}, its config says otherwise.")
    quantizer = make_quantizer(stored.quantizer)
    like = quantizer.quantize(torch.zeros(2, columns))  # two rows, to see which dimension is theirs
    parts = []
    for kind, example in (("codes", like.codes), ("scales", like.scales)):
        tensor = tensors.pop(f"{name}.{kind}", None)
        if tensor is None:
            raise ArtifactError(f"{path} lacks {name}.{kind}; quantize again.")
        is_shared = _is_shared(example)
        n_stored = 1 if is_shared else rows
        _check(path, tensor, (n_stored, *example.shape[1:]), (_SAFETENSORS_NAMES[example.dtype],))
        value = torch.from_numpy(np.array(tensor.raw)).to(device)
        tensor.release()
        parts.append(value.expand(rows, *example.shape[1:]) if is_shared else value)
    quantized = QuantizedTensor(parts[0], parts[1], stored.shape)
    _check_codes(path, name, quantizer, quantized)
    return PackedMatrix(quantizer, quantized)


_SAFETENSORS_NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.float32: "F32",
}


def _check(path: Path, tensor: LazyTensor, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes:
        raise ArtifactError(
            f"{path}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}, its config says "
            f"{' or '.join(dtypes)} {list(shape)}; quantize again."
        )


def _check_codes(path: Path, name: str, quantizer: Quantizer, quantized: QuantizedTensor) -> None:
    if not quantized.scales.isfinite().all():
        raise ArtifactError(f"{path}: {name}.scales holds a number that is not finite; quantize again.")
    # A byte without a meaning (243 and more where five ternary codes share one) would fail in the first product,
    # on a GPU without a word; the row with the largest byte tells. All others can be restored if it can.
    largest = quantized.codes.flatten(1).amax(1).argmax()
    row = quantized.rows(largest[None]).to("cpu")
    try:
        quantizer.dequantize(row)
    except IndexError:
        raise ArtifactError(f"{path}: {name}.codes holds an invalid code; quantize again.") from None
